"""The tutorial and the guide on consumers run step by step."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pg_eventstream.servers.processes import Process
from pg_eventstream.servers.pushpin import Pushpin
from tests.support.database import Database
from tests.support.documentation import Example, example
from tests.support.projects import Project
from tests.support.reader import add, migrate

TUTORIAL = "docs/tutorial-consumers.md"
FILES = [
    example("docs/tutorial-consumers.md", "ASGI_APPLICATION"),
    example("docs/tutorial-consumers.md", "class Product"),
    example("docs/tutorial-consumers.md", "def update_stock"),
    example("docs/tutorial-consumers.md", "def order(request"),
    example("docs/tutorial-consumers.md", "class StockTests"),
]
URLS = example("docs/tutorial-consumers.md", "urlpatterns")
INSTALL = example("docs/tutorial-consumers.md", "pip install")
BEGIN = example("docs/tutorial-consumers.md", "startproject")
TABLES = example("docs/tutorial-consumers.md", "makemigrations")
ORDERS = example("docs/tutorial-consumers.md", "place_order('pen', 5)")
SERVICE = example("docs/tutorial-consumers.md", "eventstream_consumers run\n")
WRONG = example("docs/tutorial-consumers.md", "place_order('pne', 1)")
AGAIN = example("docs/tutorial-consumers.md", "retry stock --all")
ANEW = example("docs/tutorial-consumers.md", "reset stock --to earliest")
TEST = example("docs/tutorial-consumers.md", "test shop")


@pytest.fixture
def desk(database: Database, pushpin: Pushpin, tmp_path: Path) -> Iterator[Project]:
    """An empty directory, and a server without a database `desk`."""
    with Project(tmp_path, "desk.settings", database, pushpin) as made:
        # libpq finds it, as it finds a reader's.
        del made.environment["DJANGO_SETTINGS_MODULE"], made.environment["PGDATABASE"]
        made.environment["PYTHONWARNINGS"] = "error::DeprecationWarning:pg_eventstream"
        programs = str(database.postgres.bin_dir)
        made.environment["PATH"] = os.pathsep.join([made.environment["PATH"], programs])
        try:
            yield made
        finally:
            made.__exit__(None, None, None)
            database.execute("DROP DATABASE IF EXISTS desk WITH (FORCE)")
            database.execute("DROP DATABASE IF EXISTS test_desk WITH (FORCE)")


@pytest.mark.faults
@pytest.mark.thorough
def test_every_step_works(desk: Project) -> None:
    def run(one: Example) -> str:
        return desk.run("sh", "-ec", one.code)

    desk.environment["PIP_DRY_RUN"] = "1"
    assert "Requirement already satisfied: pg-eventstream" in desk.run(
        "sh", "-ec", INSTALL.code.splitlines()[-1]
    )
    run(BEGIN)
    (desk.directory / "shop/tests.py").unlink()
    for one in FILES:
        add(desk, one)
    (desk.directory / "desk/urls.py").unlink()
    add(desk, URLS)
    run(TABLES)
    assert run(ORDERS).splitlines()[-1] == "93"
    assert SERVICE.code == "python manage.py eventstream_consumers run\n"

    wrong = run(WRONG)
    assert "Product matching query does not exist" in wrong
    assert "orders:3" in wrong
    again = run(AGAIN)
    assert "orders:3" not in again.splitlines()[-1]
    assert run(ANEW).splitlines()[-1] == "4 events handled."
    service = Process(
        "the consumers",
        [sys.executable, "manage.py", "eventstream_consumers", "run"],
        log_path=desk.directory / "consumers.log",
        environment=desk.environment,
        directory=desk.directory,
    )
    service.start()
    try:
        shown = desk.run("python", "manage.py", "shell", "-c", VIEW)
        assert shown.splitlines()[-2:] == ["pen: 89", "pne: 99"]
    finally:
        service.stop()
    run(TEST)


def test_readme(project: Project) -> None:
    add(project, example("README.md", "def update_stock"))
    migrate(project)
    use = """
from pg_eventstream import send_event
from shop.event_consumers import update_stock
send_event("orders", "paid", {"order": 7})
update_stock.drain()
"""
    assert project.manage("shell", "-c", use).splitlines()[-1] == "orders:1 7"


def test_guide(project: Project, database: Database) -> None:
    for one in (
        example("docs/how-to/consumers.md", "def count_sales"),
        example("docs/how-to/consumers.md", "def sales(request)"),
        example("docs/how-to/consumers.md", "def price_in_cents"),
    ):
        add(project, one)
    assert example("docs/how-to/consumers.md", "consumers run").code == SERVICE.code
    project.write("shop/models.py", SALES)
    migrate(project)
    project.write("shop/event_consumers.py", "\nfrom . import versions\n")
    done = project.manage("shell", "-c", USE)
    assert done.splitlines()[-3:] == ["2 1", "['Order 1', 'Order 2']", "250"]


VIEW = """
from django.test import Client
from shop.event_consumers import update_stock
update_stock.wait(timeout=30)  # it has started
client = Client(headers={"host": "localhost"})
print(client.get("/order/pen/", follow=True).text)
"""
SALES = """
class Sales(models.Model):
    number = models.IntegerField(default=0)

    @classmethod
    def add(cls, order, number):
        cls.objects.update_or_create(pk=1, defaults={"number": cls.total() + number})

    @classmethod
    def total(cls):
        return sum(cls.objects.values_list("number", flat=True))
"""
USE = """
from django.conf import settings
from django.core import mail
from pg_eventstream import send_event
from pg_eventstream.consumers import consumer
settings.EMAIL_BACKEND = "django.core.mail.backends.locmem.EmailBackend"
from shop.event_consumers import confirm_order, count_sales
from shop.models import Sales
from shop.versions import send_price
from shop.views import sales
mail.outbox = []
confirm_order.drain()
for order in 1, 2:
    send_event("orders", "placed", {"order": order})
send_event("returns-1", "returned", {"order": 1})
handled = count_sales.drain()
confirm_order.drain()
print(handled - 1, sales(None).text)
print([one.body for one in mail.outbox])
prices = []
read = consumer("prices", channels=["prices"], start="earliest")(lambda e: prices.append(e.json()))
send_event("prices", "price", {"euros": 2.5})
read.drain()
print(prices[0]["cents"])
"""

from django.apps import AppConfig
from django.core.signals import request_finished, request_started
from django.db.models.signals import pre_migrate


class PgEventStreamConfig(AppConfig):
    name = "pg_eventstream"
    verbose_name = "Event stream"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        # Importing `settings` and `tables` registers the system checks.
        from .checks import first_use, settings, tables  # noqa: F401
        from .grip import next_links
        from .tables import placement, unmigrated

        request_started.connect(first_use.report)
        request_started.connect(next_links.expect)
        request_finished.connect(next_links.report)
        pre_migrate.connect(placement.refuse_misplaced, sender=self)
        pre_migrate.connect(unmigrated.create_tables, sender=self)

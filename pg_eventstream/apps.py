from django.apps import AppConfig
from django.db.models.signals import pre_migrate


class PgEventStreamConfig(AppConfig):
    name = "pg_eventstream"
    verbose_name = "Event stream"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        from . import checks, unmigrated  # noqa: F401  (registers the system checks)

        pre_migrate.connect(unmigrated.create_tables, sender=self)

from django.apps import AppConfig


class PgEventStreamConfig(AppConfig):
    name = "pg_eventstream"
    verbose_name = "Event stream"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        from . import checks  # noqa: F401  (registers the system checks)

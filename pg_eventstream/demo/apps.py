from django.apps import AppConfig


class DemoConfig(AppConfig):
    name = "pg_eventstream.demo"
    label = "pg_eventstream_demo"
    default_auto_field = "django.db.models.BigAutoField"

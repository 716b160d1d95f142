"""The addresses."""

from django.contrib.auth.views import LoginView, LogoutView
from django.urls import path

from . import views

urlpatterns = [
    path("", views.board, name="board"),
    path("tasks/", views.tasks, name="tasks"),
    path("add/", views.add, name="add"),
    path("done/<int:pk>/", views.done, name="done"),
    path("stream-token/", views.stream_token, name="stream-token"),
    path("login/", LoginView.as_view(), name="login"),
    path("logout/", LogoutView.as_view(), name="logout"),
]

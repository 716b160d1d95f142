"""The pages, and what happens on them."""

from django.contrib.auth import get_user_model
from django.contrib.auth.decorators import login_required
from django.db import transaction
from django.http import HttpResponse
from django.shortcuts import get_object_or_404, render
from django.template.loader import render_to_string
from django.views.decorators.http import require_POST

from tornado_relay import current_event_id, notify, subscribe_token

from .models import Task

MAX_OPEN = 5


class TooMuch(Exception):
    """Somebody has enough to do."""


def own_channel(user):
    """Return the channel of what only ``user`` may see."""
    return f"user-{user.pk}"


@login_required
def board(request):
    """The page. Its stream begins before its tasks are read, so that nothing falls between."""
    since = current_event_id()
    return render(
        request,
        "board.html",
        {
            "since": since,
            "channel": own_channel(request.user),
            "tasks": Task.objects.select_related("owner").order_by("pk"),
            "people": get_user_model().objects.order_by("username"),
        },
    )


@login_required
def tasks(request):
    """The list alone, which pages ask for when something on it has changed."""
    return render(request, "tasks.html", {"tasks": Task.objects.select_related("owner").order_by("pk")})


@login_required
@require_POST
def add(request):
    """A new task: all pages are told, and whom it is for gets a notice."""
    owner = get_object_or_404(get_user_model(), pk=request.POST.get("owner"))
    try:
        with transaction.atomic():
            task = Task.objects.create(title=request.POST.get("title", "")[:200] or "Something", owner=owner)
            notify("board", {"event": "tasks"})
            if owner != request.user:
                notice = render_to_string("notice.html", {"task": task, "by": request.user})
                notify(own_channel(owner), {"event": "notice", "data": notice})
            if Task.objects.filter(owner=owner, done=False).count() > MAX_OPEN:
                raise TooMuch
    except TooMuch:
        # The task is rolled back, and both events with it.
        return HttpResponse(f"{owner} has {MAX_OPEN} open tasks already.")
    return HttpResponse("")


@login_required
@require_POST
def done(request, pk):
    """A task is done, or not yet after all."""
    task = get_object_or_404(Task.objects.select_for_update(), pk=pk)
    task.done = not task.done
    task.save(update_fields=["done"])
    notify("board", {"event": "tasks"})
    return HttpResponse(status=204)


@login_required
def stream_token(request):
    """A new token, for a page that has been open longer than its first one lasts."""
    return HttpResponse(subscribe_token(["board", own_channel(request.user)]))

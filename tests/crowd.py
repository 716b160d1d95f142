"""One page with many EventSources, twenty through each proxy."""

from fronts import FILES
from servers import until

PAGE = """<!doctype html><script>
  const sources = {}
  for (const [kind, url] of JSON.parse(decodeURIComponent(location.hash.slice(1)))) sources[kind] = Array.from({ length: 20 }, () => {
    const source = new EventSource(url)
    const told = { source, opened: 0, errors: 0, closed: 0, data: [] }
    source.onopen = () => told.opened++
    source.onerror = () => { told.errors++; told.closed += source.readyState == EventSource.CLOSED }
    source.onmessage = e => told.data.push(e.data)
    source.addEventListener("stream-reset", e => told.data.push(e.data))
    return told
  })
</script>"""


class Crowd:
    """
    The EventSources of `PAGE` in a browser, and what they were sent.

    Args:
        page: The browser's tab.
        kept: The broker, which keeps a history.
        channel: What they listen to.

    """

    def __init__(self, page, kept, channel):
        self.page = page
        self.kept = kept
        self.channel = channel
        self.published = []
        until(lambda: page.evaluate("typeof sources == 'object'"), "the page is there", 60)
        self.until_open()

    def told(self, kind, what):
        return self.page.evaluate(f"sources.{kind}.map(told => told.{what})")

    def errors(self):
        return {kind: self.told(kind, "errors") for kind in FILES}

    def until_each(self, condition, what, kinds=FILES):
        for kind in kinds:
            until(lambda kind=kind: condition(kind), f"{what}, through {kind}", 30)

    def until_open(self):
        self.until_each(lambda kind: self.told(kind, "source.readyState") == [1] * 20, "all are open")

    def publish(self, what):
        # A stream that breaks off is asked for again at once.
        self.kept.publish(self.channel, what, retry=100)
        self.published.append(what)

    def until_all_has_come(self):
        self.until_open()
        self.until_each(lambda kind: self.told(kind, "data") == [self.published] * 20, f"all have {self.published}")
        for kind in FILES:
            assert self.told(kind, "closed") == [0] * 20

    def disturb(self, act, kinds=FILES):
        """Call ``act``, by which all streams through ``kinds`` are to end."""
        before = self.errors()
        act()
        self.publish(act.__name__)
        self.until_each(
            lambda kind: all(now > then for now, then in zip(self.told(kind, "errors"), before[kind], strict=True)),
            f"all streams have ended by {act.__name__}",
            kinds,
        )

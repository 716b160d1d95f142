// RelaySource: an EventSource with one connection for all tabs of a browser. Its types are in relay.d.ts.
//
// The tab that holds a Web Lock leads: it has the connection, to all channels that any tab wants, and passes on by a
// BroadcastChannel what comes. Each source knows its own place in the history, so that neither a new connection nor a
// new leader loses or doubles an event for it.
(() => {
  // Of one stream, as the relay has it.
  const MAX_CHANNELS = 100
  // Of an address: proxies take 8 KiB.
  const MAX_LENGTH = 7000
  // Events for tabs that come a little later.
  const KEPT = 64
  // Milliseconds until the next try at most, and after which a tab asks if its leader is still there.
  const MAX_WAIT = 30000
  const SILENCE = 10000
  const REFUSALS = [400, 401, 403]
  const lines = {}
  const backoff = (failures, ms = 1000) => Math.min(MAX_WAIT, ms * 2 ** failures) * (0.5 + Math.random() / 2)
  const lower = name => name.replace(/[A-Z]/g, letter => letter.toLowerCase())

  // Where `id` is in the history, if it is one of the relay's own. A fresh history is at 0, which is a number like any other.
  function place(id) {
    const [, span, n] = /^([0-9a-f]{8})-(\d+)$/.exec(id) ?? []
    return { at: id, span, n: n && +n }
  }

  class RelaySource extends EventTarget {
    constructor(url, { withCredentials = false, token } = {}) {
      if (!self.TextDecoderStream) {
        // It cannot read a stream by fetch().
        const source = new EventSource(url, { withCredentials })
        source.addEventListener("STOP", () => source.close())
        return source
      }
      super()
      const { href, origin, pathname, searchParams } = new URL(url, document.baseURI)
      const [, path, last] = /(.*\/)(.*)/.exec(pathname)
      const channels = last == "events" ? searchParams.getAll("channel") : [decodeURIComponent(last.replace(/^channel=/, ""))]
      const base = origin + path, key = `sse-relay ${base} ${withCredentials} `, _saved = key + channels
      const at = searchParams.get("last_event_id") || recall(_saved)
      const _want = { id: Math.random(), channels, token: searchParams.get("token"), ...place(at) }
      Object.assign(this, { url: href, withCredentials, readyState: 0, _origin: origin, _want, _saved, _refresh: token, _failures: 0 })
      // A place that cannot be compared with others' is nothing to share.
      const shared = navigator.locks && self.BroadcastChannel && (!at || _want.span)
      this._line = (shared && lines[key]) || new Line(key, base, withCredentials, shared)
      if (shared) lines[key] = this._line
      // Scripts of the page that listen are there by then.
      const begin = () => this._line.add(this)
      if (document.readyState == "loading") addEventListener("DOMContentLoaded", begin)
      else setTimeout(begin)
    }

    close() {
      this.readyState = 2
      this._line.drop(this)
    }

    _fire(event) {
      // As a listener: what it throws is the page's, and reported as such.
      this.addEventListener(event.type, this["on" + event.type], { once: true })
      this.dispatchEvent(event)
    }

    _state(state) {
      if (this.readyState == 2 || (state && state == this.readyState)) return
      this.readyState = state
      if (state == 1) this._failures = 0
      this._fire(new Event(state == 1 ? "open" : "error"))
    }

    _take({ type, data, id, channels, folds, restart, at, n }) {
      const want = this._want
      if (this.readyState == 2 || n < want.n) return
      if (type) {
        if (n == want.n && want.span) return
        if (!want.channels.some(name => channels.includes(name) || (folds && channels.includes(lower(name))))) return
      }
      if (restart) want.n = want.span = undefined
      want.n = n ?? want.n
      if (at) Object.assign(want, place(at))
      if (!type) return
      this._fire(new MessageEvent(type, { data, lastEventId: id ?? want.at ?? "", origin: this._origin }))
      if (type == "STOP") this.close()
    }

    async _refused(status) {
      if (status == 401 && this._refresh) {
        this._state(0)
        for (let token = 0; token === 0; ) {
          if (this._failures++) await new Promise(done => setTimeout(done, backoff(this._failures)))
          token = await Promise.resolve().then(this._refresh).catch(() => 0)
          if (token) this._want.token = token
          if (token || token === undefined) return this._line.add(this)
          if (this.readyState == 2) return
        }
      }
      this._line.drop(this)
      this._state(2)
    }
  }
  for (const [state, name] of ["CONNECTING", "OPEN", "CLOSED"].entries()) RelaySource[name] = RelaySource.prototype[name] = state

  // What a tab has with the others that listen to the same relay.
  class Line {
    // Of this tab.
    sources = new Map()
    me = Math.random()
    silent = 0
    // Of all tabs, where this one leads.
    wants = new Map()
    streams = new Set()

    constructor(key, base, withCredentials, shared) {
      Object.assign(this, { key, base, withCredentials })
      addEventListener("pagehide", ({ persisted }) => {
        if (!persisted) this.sources.forEach(source => this.drop(source))
      })
      addEventListener("online", () => this.streams.forEach(stream => stream.wake?.()))
      if (!shared) return void this.lead()
      this.port = new BroadcastChannel(key)
      this.port.onmessage = ({ data }) => this.hear(data)
      this.queue()
      // A leader that is frozen or stuck would be silent for ever.
      setInterval(() => {
        if (this.leads || document.hidden || !this.sources.size) this.silent = 0
        else if (++this.silent > 2) this.queue({ steal: true })
        else if (this.silent > 1) this.say({ ping: 1 })
      }, SILENCE)
    }

    add(source) {
      if (source.readyState == 2) return
      this.sources.set(source._want.id, source)
      this.say({ want: source._want })
    }

    drop({ _want: { id, at, span }, _saved }) {
      if (!this.sources.delete(id)) return
      this.say({ drop: id })
      try {
        sessionStorage[_saved] = span ? at : ""
      } catch {}
    }

    say(what) {
      what.from = this.me
      this.port?.postMessage(what)
      this.hear(what)
    }

    hear({ from, lead, to, events, refused, state, wait, attempt, want, drop, ping, retry }) {
      if (lead) {
        this.leader = from
        for (const source of this.sources.values()) this.say({ want: source._want })
      }
      // One that comes later learns by the first answer who leads.
      if (to) this.leader ??= from
      if (from == this.leader) {
        this.silent = 0
        for (const source of (to ?? []).map(id => this.sources.get(id))) {
          if (events) events.forEach(event => source?._take(event))
          else if (refused) source?._refused(refused)
          else source?._state(state)
        }
        // Timers of a hidden leader may be late by a minute, those of a tab that is looked at are not.
        if (wait) setTimeout(() => this.say({ retry: attempt }), wait)
      }
      if (!this.leads) return
      if (want) {
        this.wants.set(want.id, want)
        if (this.gathered) this.arrange()
      }
      if (drop) this.forget(drop)
      if (ping) this.say({})
      if (retry) this.streams.forEach(stream => stream.attempt == retry && stream.wake())
    }

    // Wait for the lead.
    queue(options = {}) {
      navigator.locks.request(this.key, options, () => this.lead()).catch(({ name }) => {
        // Such as in a sandboxed frame, which is alone.
        if (name != "AbortError") {
          this.port = this.port.close()
          return this.lead()
        }
        this.leads = this.gathered = false
        this.streams.forEach(stream => stream.end())
        this.wants.clear()
        this.queue()
      })
    }

    lead() {
      this.leads = true
      this.say({ lead: 1 })
      // All tabs answer; one connection is for them all.
      setTimeout(() => {
        this.gathered = true
        this.arrange()
      }, 50)
      return new Promise(() => {})
    }

    arrange() {
      const taken = new Set([...this.streams].flatMap(stream => [...stream.wants.keys()]))
      for (const want of this.wants.values()) {
        if (taken.has(want.id)) continue
        const streams = [...this.streams]
        const stream = streams.find(stream => stream.covers(want)) ?? streams.find(stream => stream.fits(want)) ?? new Stream(this)
        stream.add(want)
      }
    }

    forget(id) {
      this.wants.delete(id)
      this.streams.forEach(stream => stream.wants.delete(id) && !stream.wants.size && stream.end())
    }
  }

  // One connection, for what several sources want.
  class Stream {
    wants = new Map()
    failures = 0

    constructor(line) {
      this.line = line
      line.streams.add(this)
    }

    // Whether `want` loses nothing if it joins what is open.
    covers(want) {
      return this.up && want.channels.every(name => this.asked.includes(name)) && (want.span ? this.same(want) && want.n >= this.since : !want.at)
    }

    // Whether there may be a new connection for `want` too: without a history what comes meanwhile would be lost.
    fits(want) {
      return (!this.up || this.history) && this.same(want) && this.channels(want).length <= MAX_CHANNELS && this.address([...this.wants.values(), want]).length < MAX_LENGTH
    }

    same({ span }) {
      return !span || !this.span || span == this.span
    }

    channels(...more) {
      return [...new Set([...this.wants.values(), ...more].flatMap(want => want.channels))]
    }

    // For each channel one token is enough: the newest, which is likely to last longest.
    address(wants, rest) {
      const query = new URLSearchParams(rest)
      for (const { channels, token } of wants.reverse()) {
        const more = channels.filter(name => !query.getAll("channel").includes(name))
        for (const name of more) query.append("channel", name)
        if (token && more[0]) query.append("token", token)
      }
      return this.line.base + "events?" + query
    }

    add(want) {
      const { id, at, n, span } = want, { line, kept } = this
      this.wants.set(id, want)
      if (this.covers(want)) {
        line.say({ state: 1, to: [id] })
        line.say({ events: span ? kept : [{ at: this.at, n: this.n }], to: [id] })
        return
      }
      // It goes on from the place that is furthest back.
      if (at && (!this.at || !span || n < this.n)) Object.assign(this, { at, n, span })
      this.again = true
      this.cut?.abort()
      this.wake?.()
      this.running ??= this.run()
    }

    end() {
      this.line.streams.delete(this)
      this.wants.clear()
      this.cut?.abort()
      this.wake?.()
    }

    async run() {
      while (this.wants.size) {
        this.again = false
        await this.read().catch(() => {})
        this.up = false
        clearTimeout(this.timer)
        if (this.again) continue
        const attempt = (this.attempt = Math.random())
        this.line.say({ state: 0, to: [...this.wants.keys()], wait: backoff(this.failures++, this.retry), attempt })
        await new Promise(done => (this.wake = done))
      }
    }

    async read() {
      const { line, n: since, at: last_event_id = "" } = this
      Object.assign(this, { since, kept: [], asked: this.channels(), cut: new AbortController() })
      const ask = (wants, rest, method) => {
        const credentials = line.withCredentials ? "include" : "same-origin"
        const asked = fetch(this.address(wants, rest), { method, credentials, cache: "no-store", signal: this.cut.signal, headers: { Accept: "text/event-stream" } })
        // A request with credentials hides the 403 for the page's origin; this one shows it.
        return line.withCredentials ? asked.catch(() => fetch(line.base + "healthz", { signal: this.cut.signal })) : asked
      }
      this.heard()
      const wants = [...this.wants.values()]
      const { status, body } = await ask([...wants], { labels: 1, last_event_id })
      if (REFUSALS.includes(status))
        // What one may not have must not keep the others from theirs.
        for (const want of wants) {
          const refused = wants[1] ? (await ask([want], {}, "HEAD")).status : status
          if (!REFUSALS.includes(refused)) continue
          line.forget(want.id)
          line.say({ refused, to: [want.id] })
          this.again = true
        }
      const reader = body.pipeThrough(new TextDecoderStream()).getReader()
      for (let rest = "", block = {}, found = [], afterCR; ; ) {
        const { value, done } = await reader.read()
        if (done) return
        this.heard()
        const texts = (rest + (afterCR ? value.replace(/^\n/, "") : value)).split(/\r\n?|\n/)
        afterCR = value.endsWith("\r")
        rest = texts.pop()
        for (const text of texts) {
          const [, name, value] = /^([^:]*):? ?(.*)$/s.exec(text)
          if (!text) this.block(block, found), (block = {})
          else if (name == "data") block.data = name in block ? block.data + "\n" + value : value
          else if (name != "id" || !value.includes("\0")) block[name] = value
        }
        // A reset that belongs to the opening comes before it, and a page is to hear that it is open first.
        if (this.up && found[0]) line.say({ events: found.splice(0), to: [...this.wants.keys()] })
      }
    }

    // A connection that is dead without a word is given up after three heartbeats.
    heard() {
      clearTimeout(this.timer)
      this.timer = setTimeout(() => this.cut.abort(), 3000 * (this.heartbeat ?? 15))
    }

    block({ event, data, id, channel, seq, retry, heartbeat, folds }, found) {
      // A longer one is no pause that anybody means.
      if (/^\d{1,9}$/.test(retry) && +retry) this.retry = +retry
      if (heartbeat) {
        Object.assign(this, { heartbeat, folds: +folds, history: id != "none", up: true, failures: 0 })
        this.line.say({ state: 1, to: [...this.wants.keys()] })
      }
      // The id of a stream-open or stream-position, which have no channel, is the place up to which there is all, as is that
      // of an event that has its number. Pages are not given these two.
      const { at, n, span } = place(id)
      if (id && (!channel || n == seq)) {
        Object.assign(this, { at, n, span })
        this.since ??= n
      }
      if (id && !channel) return void found.push({ at, n })
      if (data == null) return
      // Without a channel it is a stream-reset.
      const { reason, channels = [channel] } = channel ? {} : JSON.parse(data)
      const restart = /^(history-lost|unknown-id)$/.test(reason)
      if (restart) Object.assign(this, { kept: [], since: undefined })
      const one = { type: event || "message", data, id, folds: this.folds, channels, restart, n: seq && +seq, at: n == seq && at }
      found.push(one)
      if (seq) this.kept.push(one)
      if (this.kept.length > KEPT) this.since = this.kept.shift().n
    }
  }

  // A page that is loaded again goes on where it was left. Where there may be no storage, touching it is an error.
  function recall(saved) {
    try {
      const [{ type }] = performance.getEntriesByType("navigation")
      return document.readyState != "complete" && type == "reload" && sessionStorage[saved]
    } catch {}
  }

  self.RelaySource ??= RelaySource
  const { stream, name = "relay", refresh, credentials } = document.currentScript?.dataset ?? {}
  const token = refresh && (() => fetch(refresh).then(answer => (answer.redirected || REFUSALS.includes(answer.status) ? null : answer.ok ? answer.text() : Promise.reject())))
  if (stream) self[name] = new self.RelaySource(stream, { withCredentials: credentials == "include", token })
})()

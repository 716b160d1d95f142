-- Events that streams can come back to.
--
-- A transaction that publishes puts its events into `outbox`. When it commits, a deferred trigger takes one lock,
-- draws the next id, moves the event to `event` and notifies. The lock is held until the commit can be seen by all, so
-- ids, the order of commits and the order of notifications are the same, and nobody who has read up to an id can
-- ever find a lower one later. A sequence's default would be drawn long before the commit, and would not hold that.

CREATE SCHEMA sse_relay;

CREATE TABLE sse_relay.version (
    version integer PRIMARY KEY,
    applied_at timestamptz NOT NULL DEFAULT now()
);

CREATE SEQUENCE sse_relay.event_id;

CREATE TABLE sse_relay.event (
    id bigint PRIMARY KEY,
    token text NOT NULL,
    channel text NOT NULL,
    payload text NOT NULL,
    own_id text,
    -- Whether an event of the channel had the same id before it: none to come back to, even if that one goes.
    own_id_again boolean NOT NULL,
    at timestamptz NOT NULL
);
CREATE INDEX event_channel_id ON sse_relay.event (channel, id);
CREATE INDEX event_channel_own_id ON sse_relay.event (channel, own_id) WHERE own_id IS NOT NULL;
-- Rows come at one end and go at the other: dead ones must not pile up there.
ALTER TABLE sse_relay.event SET (autovacuum_vacuum_scale_factor = 0.02);

-- Empty outside of transactions, so a crash, which empties it, takes nothing. Its numbers are logged all the same: a
-- sequence that an unlogged table owns is unlogged as well from PostgreSQL 15 on, and 18.4 cannot read it after a standby
-- was promoted ("bad magic number in sequence").
CREATE SEQUENCE sse_relay.outbox_n;
CREATE UNLOGGED TABLE sse_relay.outbox (
    n bigint PRIMARY KEY DEFAULT nextval('sse_relay.outbox_n'),
    channel text NOT NULL,
    payload text NOT NULL,
    own_id text,
    due boolean NOT NULL DEFAULT false
);

-- A run of ids that one server drew on one copy of the data. An id is known by its run's token as well: after a
-- database was set back (a restored backup, a replica that had not got all), ids are drawn a second time, for other
-- events, and those of the first time must not be taken for them.
CREATE TABLE sse_relay.span (
    n bigint PRIMARY KEY,
    first_id bigint NOT NULL,
    token text NOT NULL UNIQUE,
    server_start timestamptz NOT NULL,
    filenode oid NOT NULL,
    database oid NOT NULL,
    -- The transaction that wrote the row. A restore writes it again, in another one.
    written xid
);

-- Up to where events have been deleted by age, and up to where they have been counted.
CREATE TABLE sse_relay.state (
    pruned_through bigint NOT NULL DEFAULT 0,
    counted_through bigint NOT NULL DEFAULT 0
);
INSERT INTO sse_relay.state DEFAULT VALUES;

-- How many of the counted events of a channel are there, and up to where they have been deleted for being too many.
CREATE TABLE sse_relay.pruned (
    channel text PRIMARY KEY,
    kept bigint NOT NULL,
    through bigint NOT NULL DEFAULT 0
);
CREATE INDEX pruned_kept ON sse_relay.pruned (kept);

-- Returns the token of the newest span, or NULL if the server or the data are not those that it began on. It is in
-- plpgsql, which keeps its plan: each commit calls it.
CREATE FUNCTION sse_relay.valid_token() RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN (
        SELECT s.token FROM (SELECT *, xmin FROM sse_relay.span ORDER BY n DESC LIMIT 1) s
        WHERE s.server_start = pg_postmaster_start_time()
            AND s.filenode = pg_relation_filenode('sse_relay.event')
            AND s.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
            AND s.written = s.xmin
    );
END $$;

-- Begins a span behind the last event and behind `last_id`, and returns its token. The caller holds the lock. It draws the
-- id behind this: a copy of the data that was put in place may draw from further on than its last event, and what is in
-- between is of the lost time.
CREATE FUNCTION sse_relay.begin_span(last_id bigint) RETURNS text
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    newest sse_relay.span;
    node oid := pg_relation_filenode('sse_relay.event');
    base oid := (SELECT d.oid FROM pg_database d WHERE d.datname = current_database());
BEGIN
    SELECT * INTO newest FROM sse_relay.span ORDER BY n DESC LIMIT 1;
    -- Also lets a transaction fail (40001) whose snapshot does not see a span that has begun since.
    UPDATE sse_relay.state s SET pruned_through = CASE
        WHEN newest.filenode <> node AND NOT EXISTS (SELECT FROM sse_relay.event)
            THEN greatest(s.pruned_through, (SELECT q.last_value FROM sse_relay.event_id q WHERE q.is_called))
        ELSE s.pruned_through END;
    -- A standby that takes over can have a sequence of before the last events, where the database was made from a template:
    -- CREATE DATABASE copies that 32 numbers to come are logged, but that log is the template's. So spans have none.
    PERFORM setval('sse_relay.event_id', h.id) FROM sse_relay.head() h, sse_relay.event_id q WHERE q.last_value < h.id;
    INSERT INTO sse_relay.span (n, first_id, token, server_start, filenode, database)
        SELECT coalesce(newest.n, 0) + 1, greatest(h.id, last_id) + 1, left(md5(random()::text || clock_timestamp()), 8),
            pg_postmaster_start_time(), node, base
        FROM sse_relay.head() h
        RETURNING n, token INTO newest.n, newest.token;
    -- In a savepoint that is not the transaction of pg_current_xact_id().
    UPDATE sse_relay.span s SET written = s.xmin WHERE s.n = newest.n;
    RETURN newest.token;
END $$;

-- What an operator truncates is gone up to the last id that was drawn.
CREATE FUNCTION sse_relay.truncated() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    UPDATE sse_relay.state s SET pruned_through =
        greatest(s.pruned_through, (SELECT q.last_value FROM sse_relay.event_id q WHERE q.is_called));
    RETURN NULL;
END $$;
CREATE TRIGGER truncated AFTER TRUNCATE ON sse_relay.event
    FOR EACH STATEMENT EXECUTE FUNCTION sse_relay.truncated();

-- Returns where the history ends now.
CREATE FUNCTION sse_relay.head() RETURNS TABLE (token text, id bigint)
LANGUAGE sql STABLE ROWS 1 SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT (SELECT s.token FROM sse_relay.span s WHERE s.first_id <= h.id + 1 ORDER BY s.n DESC LIMIT 1), h.id
    FROM (SELECT coalesce((SELECT max(e.id) FROM sse_relay.event e), (SELECT s.pruned_through FROM sse_relay.state s))) h (id)
$$;

-- The same for a relay that connects: from here on ids that this database has not drawn are told from those it has.
CREATE FUNCTION sse_relay.open() RETURNS TABLE (token text, id bigint)
LANGUAGE plpgsql ROWS 1 SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF sse_relay.valid_token() IS NULL THEN
        PERFORM pg_advisory_xact_lock(8319104478);
        IF sse_relay.valid_token() IS NULL THEN
            PERFORM sse_relay.begin_span(0);
        END IF;
    END IF;
    RETURN QUERY SELECT * FROM sse_relay.head();
END $$;

CREATE FUNCTION sse_relay.commit_event() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    event_id bigint;
    event_token text;
    last_id bigint;
    target text := NEW.channel;
    message text;
BEGIN
    PERFORM pg_advisory_xact_lock(8319104478);
    event_token := coalesce(sse_relay.valid_token(), sse_relay.begin_span(0));
    event_id := nextval('sse_relay.event_id');
    SELECT greatest((SELECT max(e.id) FROM sse_relay.event e), s.pruned_through, s.counted_through) INTO last_id
        FROM sse_relay.state s;
    -- Somebody has set the sequence back, as ALTER SEQUENCE ... RESTART does. Ids go on behind all that were drawn.
    IF event_id <= last_id THEN
        event_token := sse_relay.begin_span(last_id);
        event_id := setval('sse_relay.event_id', last_id + 1);
    END IF;
    DELETE FROM sse_relay.outbox WHERE n = NEW.n;
    INSERT INTO sse_relay.event
        VALUES (event_id, event_token, NEW.channel, NEW.payload, NEW.own_id, EXISTS (
            SELECT FROM sse_relay.event e WHERE e.channel = NEW.channel AND e.own_id = NEW.own_id
        ), clock_timestamp());
    -- NOTIFY takes channels of 63 bytes: longer ones share one.
    IF octet_length(convert_to(target, 'UTF8')) > 63 OR target = 'sse_relay_long_names' THEN
        target := 'sse_relay_long_names';
    END IF;
    message := chr(30) || event_token || '-' || event_id || chr(30)
        || CASE WHEN target = NEW.channel AND target <> 'sse_relay_long_names' THEN '' ELSE NEW.channel END;
    -- NOTIFY takes payloads of 7,999 bytes: of longer ones the relay reads the row.
    IF octet_length(message) + 1 + octet_length(NEW.payload) <= 7999 THEN
        message := message || chr(30) || NEW.payload;
    END IF;
    PERFORM pg_notify(target, message);
    RETURN NULL;
END $$;

-- The lock comes last, behind the checks that a transaction has deferred, such as those of Django's foreign keys: one
-- that waited for a row while it held the lock would stop every writer, and the row's owner could not commit either.
-- What a deferred trigger defers runs behind all others.
CREATE FUNCTION sse_relay.commit_last() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    UPDATE sse_relay.outbox SET due = true WHERE n = NEW.n;
    RETURN NULL;
END $$;

CREATE CONSTRAINT TRIGGER commit_last AFTER INSERT ON sse_relay.outbox
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION sse_relay.commit_last();
CREATE CONSTRAINT TRIGGER commit_event AFTER UPDATE ON sse_relay.outbox
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION sse_relay.commit_event();
-- In sessions with session_replication_role = replica as well.
ALTER TABLE sse_relay.outbox ENABLE ALWAYS TRIGGER commit_last, ENABLE ALWAYS TRIGGER commit_event;

-- What notify() calls, which has checked its arguments.
CREATE FUNCTION sse_relay.publish(channel text, payload text, own_id text) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    INSERT INTO sse_relay.outbox (channel, payload, own_id) VALUES ($1, $2, $3)
$$;

-- The same for triggers and other languages: relay_notify('orders', '{"event": "NEW_ORDER", "data": "hello"}').
CREATE FUNCTION relay_notify(channel text, payload jsonb) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    own_id text;
BEGIN
    IF channel IS NULL OR length(channel) NOT BETWEEN 1 AND 200 OR channel ~ '[\x01-\x1f\x7f-\x9f]' THEN
        RAISE EXCEPTION 'relay_notify: the channel must be 1 to 200 characters, none of them a control character'
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF payload IS NULL THEN
        RAISE EXCEPTION 'relay_notify: the payload is NULL' USING ERRCODE = 'null_value_not_allowed';
    END IF;
    IF octet_length(payload::text) > 1048576 THEN
        RAISE EXCEPTION 'relay_notify: the payload is % bytes, 1048576 is the limit', octet_length(payload::text)
            USING ERRCODE = 'program_limit_exceeded';
    END IF;
    IF jsonb_typeof(payload) = 'object' AND payload - ARRAY['event', 'id', 'data', 'retry', 'comment', 'sep'] = '{}' THEN
        own_id := payload ->> 'id';
    END IF;
    INSERT INTO sse_relay.outbox (channel, payload, own_id)
        VALUES (channel, payload::text, CASE WHEN length(own_id) BETWEEN 1 AND 200 THEN own_id END);
END $$;

-- Deletes at most `batch` events that are older than `seconds`, or not among the newest `keep` of their channel.
-- Returns whether there is more to do. Writers only insert, so no row that goes is one that a writer waits for.
CREATE FUNCTION sse_relay.prune(keep bigint, seconds double precision, batch integer) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    state sse_relay.state;
    last bigint;
    examined bigint;
    gone bigint;
    room bigint := batch;
    full_channel sse_relay.pruned;
BEGIN
    -- One at a time, of all relays.
    IF NOT pg_try_advisory_xact_lock(8319104479) THEN
        RETURN false;
    END IF;
    SELECT * INTO state FROM sse_relay.state;

    -- By age: up to the newest of the oldest ones that is too old.
    SELECT max(o.id) INTO last FROM (
        SELECT e.id, e.at FROM sse_relay.event e WHERE e.id > state.pruned_through ORDER BY e.id LIMIT batch
    ) o WHERE o.at < clock_timestamp() - make_interval(secs => seconds);
    IF last IS NOT NULL THEN
        WITH deleted AS (
            DELETE FROM sse_relay.event e WHERE e.id > state.pruned_through AND e.id <= last RETURNING e.id, e.channel
        )
        UPDATE sse_relay.pruned p SET kept = p.kept - d.number
        FROM (SELECT channel, count(*) AS number FROM deleted WHERE id <= state.counted_through GROUP BY channel) d
        WHERE p.channel = d.channel;
        DELETE FROM sse_relay.pruned p WHERE p.kept <= 0 AND p.through <= last;
        DELETE FROM sse_relay.span s USING sse_relay.span later WHERE later.n > s.n AND later.first_id <= last;
        UPDATE sse_relay.state SET pruned_through = last;
        RETURN true;
    END IF;

    -- By count: each event is counted once, and what is too much then goes at the old end of its channel.
    SELECT max(r.id), count(*) INTO last, examined FROM (
        SELECT e.id FROM sse_relay.event e WHERE e.id > state.counted_through ORDER BY e.id LIMIT batch
    ) r;
    IF examined > 0 THEN
        INSERT INTO sse_relay.pruned AS p (channel, kept)
            SELECT e.channel, count(*) FROM sse_relay.event e WHERE e.id > state.counted_through AND e.id <= last GROUP BY e.channel
        ON CONFLICT (channel) DO UPDATE SET kept = p.kept + excluded.kept;
        UPDATE sse_relay.state SET counted_through = last;
    END IF;
    FOR full_channel IN SELECT * FROM sse_relay.pruned p WHERE p.kept > keep ORDER BY p.kept DESC LIMIT batch LOOP
        WITH surplus AS (
            SELECT e.id FROM sse_relay.event e
            WHERE e.channel = full_channel.channel AND e.id > greatest(full_channel.through, state.pruned_through)
            ORDER BY e.id LIMIT least(full_channel.kept - keep, room)
        ), deleted AS (
            DELETE FROM sse_relay.event e USING surplus s WHERE e.id = s.id RETURNING e.id
        )
        SELECT count(*), max(d.id) INTO gone, last FROM deleted d;
        -- Nothing found means that somebody has deleted events by hand.
        UPDATE sse_relay.pruned p SET
            kept = CASE WHEN gone > 0 THEN full_channel.kept - gone ELSE keep END,
            through = greatest(p.through, last)
        WHERE p.channel = full_channel.channel;
        room := room - gone;
        IF room <= 0 THEN
            RETURN true;
        END IF;
    END LOOP;
    RETURN examined = batch;
END $$;

REVOKE ALL ON FUNCTION relay_notify(text, jsonb) FROM PUBLIC;
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA sse_relay FROM PUBLIC;

SELECT sse_relay.open();

-- What the two sides need and no more, where they are not the role that ran init-db.
-- The application: to publish, and to ask for the newest id.
GRANT USAGE ON SCHEMA sse_relay TO application_role;
GRANT EXECUTE ON FUNCTION sse_relay.publish(text, text, text), sse_relay.head() TO application_role;
GRANT EXECUTE ON FUNCTION relay_notify(text, jsonb) TO application_role;
-- The relay: to read, and to delete what is old.
GRANT USAGE ON SCHEMA sse_relay TO relay_role;
GRANT SELECT ON ALL TABLES IN SCHEMA sse_relay TO relay_role;
GRANT EXECUTE ON FUNCTION sse_relay.open(), sse_relay.head(), sse_relay.prune(bigint, double precision, integer) TO relay_role;

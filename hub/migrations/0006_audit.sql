-- What happened in a workspace, in a chain of hashes (spec/PROTOCOL.md, "Audit log").
--
-- The hub reads both tables and writes neither: rows come in by `append_audit`, which computes the chain,
-- and go, once they are old, by `expire_audit`, which says so in the chain. Both belong to
-- `connect_audit`, as which nobody can log in.

DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = 'connect_audit') THEN
        CREATE ROLE connect_audit NOLOGIN;
    END IF;
END
$$;
GRANT USAGE ON SCHEMA connect TO connect_audit;

CREATE TABLE connect.audit_heads (
    workspace_id bytea PRIMARY KEY REFERENCES connect.workspaces,
    -- How many rows were ever written, and the hash of the last.
    seq          bigint NOT NULL DEFAULT 0 CHECK (seq >= 0),
    hash         bytea NOT NULL DEFAULT decode(repeat('00', 32), 'hex') CHECK (octet_length(hash) = 32),
    -- The last row that was removed for its age, and its hash.
    base_seq     bigint NOT NULL DEFAULT 0 CHECK (base_seq BETWEEN 0 AND seq),
    base_hash    bytea NOT NULL DEFAULT decode(repeat('00', 32), 'hex') CHECK (octet_length(base_hash) = 32)
);
CALL connect.isolate('connect.audit_heads');

CREATE TABLE connect.audit_events (
    workspace_id bytea NOT NULL REFERENCES connect.workspaces,
    seq          bigint NOT NULL CHECK (seq > 0),
    hash         bytea NOT NULL CHECK (octet_length(hash) = 32),
    -- JSON, byte for byte as it was hashed. The columns below cannot say anything else.
    event        text NOT NULL CHECK (octet_length(event) BETWEEN 1 AND 65536),
    -- Milliseconds since 1970.
    at           bigint NOT NULL GENERATED ALWAYS AS ((event::jsonb ->> 'at')::bigint) STORED,
    kind         text NOT NULL GENERATED ALWAYS AS (event::jsonb ->> 'kind') STORED,
    agent_id     text GENERATED ALWAYS AS (event::jsonb ->> 'agent_id') STORED,
    peer_id      text GENERATED ALWAYS AS (event::jsonb ->> 'peer_id') STORED,
    PRIMARY KEY (workspace_id, seq)
);
CREATE INDEX audit_events_by_time ON connect.audit_events (workspace_id, at);
CALL connect.isolate('connect.audit_events');

GRANT SELECT ON connect.audit_heads, connect.audit_events TO connect_app;
CREATE POLICY audit_select ON connect.audit_heads FOR SELECT TO connect_audit USING (true);
CREATE POLICY audit_insert ON connect.audit_heads FOR INSERT TO connect_audit WITH CHECK (true);
CREATE POLICY audit_update ON connect.audit_heads FOR UPDATE TO connect_audit USING (true) WITH CHECK (true);
CREATE POLICY audit_select ON connect.audit_events FOR SELECT TO connect_audit USING (true);
CREATE POLICY audit_insert ON connect.audit_events FOR INSERT TO connect_audit WITH CHECK (true);
CREATE POLICY audit_delete ON connect.audit_events FOR DELETE TO connect_audit USING (true);
GRANT SELECT, INSERT, UPDATE ON connect.audit_heads TO connect_audit;
GRANT SELECT, INSERT, DELETE ON connect.audit_events TO connect_audit;

-- The hash of a row.
CREATE FUNCTION connect.audit_link(workspace bytea, previous bytea, seq bigint, event text) RETURNS bytea
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT sha256('connect/v1 audit'::bytea || '\x00'::bytea || workspace || int8send(seq) || previous
                  || convert_to(event, 'UTF8'))
$$;
REVOKE ALL ON FUNCTION connect.audit_link(bytea, bytea, bigint, text) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION connect.audit_link(bytea, bytea, bigint, text) TO connect_audit;

-- Appends events to the log of the workspace that the transaction is in, one writer at a time.
CREATE FUNCTION connect.append_audit(events text[]) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    workspace CONSTANT bytea := decode(nullif(current_setting('connect.workspace_id', true), ''), 'hex');
    head connect.audit_heads%ROWTYPE;
    new_event text;
BEGIN
    IF workspace IS NULL THEN
        RAISE EXCEPTION 'no workspace is set' USING ERRCODE = 'insufficient_privilege';
    END IF;
    INSERT INTO connect.audit_heads (workspace_id) VALUES (workspace) ON CONFLICT DO NOTHING;
    SELECT * INTO STRICT head FROM connect.audit_heads h WHERE h.workspace_id = workspace FOR UPDATE;
    FOREACH new_event IN ARRAY events LOOP
        head.seq := head.seq + 1;
        head.hash := connect.audit_link(workspace, head.hash, head.seq, new_event);
        INSERT INTO connect.audit_events (workspace_id, seq, hash, event)
        VALUES (workspace, head.seq, head.hash, new_event);
    END LOOP;
    UPDATE connect.audit_heads h SET seq = head.seq, hash = head.hash WHERE h.workspace_id = workspace;
END
$$;
REVOKE ALL ON FUNCTION connect.append_audit(text[]) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION connect.append_audit(text[]) TO connect_app;

-- Removes rows, of all workspaces, that are older than `keep`, and says so in each log: as many as are
-- quickly done, so call it until it removes none. How many it removed is all that its caller learns.
-- Whoever serves as the hub cannot remove what is younger than 30 days with it.
CREATE FUNCTION connect.expire_audit(keep interval) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    now_ms CONSTANT bigint := floor(extract(epoch FROM now()) * 1000);
    before CONSTANT bigint := floor(extract(epoch FROM now() - keep) * 1000);
    head connect.audit_heads%ROWTYPE;
    last bigint;
    last_hash bytea;
    removed bigint := 0;
    new_event text;
BEGIN
    IF keep IS NULL OR keep < interval '30 days' THEN
        RAISE EXCEPTION 'rows are kept for at least 30 days';
    END IF;
    FOR head IN
        SELECT * FROM connect.audit_heads h
        WHERE EXISTS (SELECT FROM connect.audit_events e
                      WHERE e.workspace_id = h.workspace_id AND e.seq = h.base_seq + 1 AND e.at < before)
        ORDER BY h.workspace_id LIMIT 16
        FOR UPDATE SKIP LOCKED
    LOOP
        -- Up to the first that is younger: what is left has no gap, whatever the clock did.
        SELECT coalesce(min(e.seq) - 1, head.seq) INTO STRICT last FROM connect.audit_events e
        WHERE e.workspace_id = head.workspace_id AND e.at >= before;
        last := least(last, head.base_seq + 4096);
        SELECT e.hash INTO last_hash FROM connect.audit_events e
        WHERE e.workspace_id = head.workspace_id AND e.seq = last;
        -- A log that was tampered with stays as it is, for whoever looks into it.
        CONTINUE WHEN last_hash IS NULL;
        DELETE FROM connect.audit_events e WHERE e.workspace_id = head.workspace_id AND e.seq <= last;
        removed := removed + last - head.base_seq;
        new_event := format('{"at":%s,"kind":"audit_expired","through":%s}', now_ms, last);
        head.seq := head.seq + 1;
        head.hash := connect.audit_link(head.workspace_id, head.hash, head.seq, new_event);
        INSERT INTO connect.audit_events (workspace_id, seq, hash, event)
        VALUES (head.workspace_id, head.seq, head.hash, new_event);
        UPDATE connect.audit_heads h
        SET seq = head.seq, hash = head.hash, base_seq = last, base_hash = last_hash
        WHERE h.workspace_id = head.workspace_id;
    END LOOP;
    RETURN removed;
END
$$;
REVOKE ALL ON FUNCTION connect.expire_audit(interval) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION connect.expire_audit(interval) TO connect_app;

GRANT connect_audit TO CURRENT_USER;
GRANT CREATE ON SCHEMA connect TO connect_audit;
ALTER FUNCTION connect.append_audit(text[]) OWNER TO connect_audit;
ALTER FUNCTION connect.expire_audit(interval) OWNER TO connect_audit;
REVOKE CREATE ON SCHEMA connect FROM connect_audit;
REVOKE connect_audit FROM CURRENT_USER;

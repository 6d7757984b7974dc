-- Keys with which programs read a workspace over HTTP. Each belongs to the agent that made it, and ends
-- with it.

CREATE TABLE connect.api_keys (
    workspace_id bytea NOT NULL REFERENCES connect.workspaces,
    -- The first 16 bytes of the hash.
    key_id       bytea NOT NULL CHECK (octet_length(key_id) = 16),
    -- SHA-256 of 256 random bits, which the hub chose.
    key_hash     bytea NOT NULL CHECK (octet_length(key_hash) = 32),
    agent_id     bytea NOT NULL,
    scopes       text[] NOT NULL CHECK (scopes <@ ARRAY['read', 'audit', 'write']),
    created_at   timestamptz NOT NULL DEFAULT now(),
    expires_at   timestamptz NOT NULL,
    last_used_at timestamptz,
    PRIMARY KEY (workspace_id, key_id),
    FOREIGN KEY (workspace_id, agent_id) REFERENCES connect.agents ON DELETE CASCADE
);
CREATE INDEX api_keys_by_hash ON connect.api_keys (key_hash);
CREATE INDEX api_keys_by_agent ON connect.api_keys (workspace_id, agent_id);
CALL connect.isolate('connect.api_keys');
GRANT SELECT, INSERT, UPDATE (last_used_at), DELETE ON connect.api_keys TO connect_app;

CREATE POLICY find ON connect.api_keys FOR SELECT TO connect_lookup USING (true);
GRANT SELECT (workspace_id, key_hash) ON connect.api_keys TO connect_lookup;

-- Which workspace a key is for; all else is read inside that workspace.
CREATE FUNCTION connect.workspace_of_api_key(hash bytea) RETURNS bytea
LANGUAGE sql STABLE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT k.workspace_id FROM connect.api_keys k WHERE k.key_hash = hash
$$;
REVOKE ALL ON FUNCTION connect.workspace_of_api_key(bytea) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION connect.workspace_of_api_key(bytea) TO connect_app;

GRANT connect_lookup TO CURRENT_USER;
GRANT CREATE ON SCHEMA connect TO connect_lookup;
ALTER FUNCTION connect.workspace_of_api_key(bytea) OWNER TO connect_lookup;
REVOKE CREATE ON SCHEMA connect FROM connect_lookup;
REVOKE connect_lookup FROM CURRENT_USER;

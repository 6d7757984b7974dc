-- Who may create a workspace, when registration is not open. They belong to the hub and to no workspace:
-- the hub may add one and spend one that it was shown, and can list none.

CREATE TABLE connect.registration_tokens (
    -- SHA-256 of 256 random bits.
    token_hash bytea PRIMARY KEY CHECK (octet_length(token_hash) = 32),
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz NOT NULL,
    used_at    timestamptz
);
ALTER TABLE connect.registration_tokens ENABLE ROW LEVEL SECURITY;
ALTER TABLE connect.registration_tokens FORCE ROW LEVEL SECURITY;
CREATE POLICY add ON connect.registration_tokens FOR INSERT WITH CHECK (used_at IS NULL);
CREATE POLICY find ON connect.registration_tokens FOR SELECT TO connect_lookup USING (true);
CREATE POLICY spend ON connect.registration_tokens FOR UPDATE TO connect_lookup USING (true);
GRANT INSERT (token_hash, expires_at) ON connect.registration_tokens TO connect_app;
GRANT SELECT, UPDATE (used_at) ON connect.registration_tokens TO connect_lookup;

-- Spends a token; false when it is unknown, spent or expired. Rolled back with the transaction.
CREATE FUNCTION connect.spend_registration_token(hash bytea) RETURNS boolean
LANGUAGE sql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
    WITH spent AS (
        UPDATE connect.registration_tokens SET used_at = now()
        WHERE token_hash = hash AND used_at IS NULL AND expires_at > now()
        RETURNING true
    )
    SELECT EXISTS (SELECT FROM spent)
$$;
REVOKE ALL ON FUNCTION connect.spend_registration_token(bytea) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION connect.spend_registration_token(bytea) TO connect_app;

-- A function that belonged to the owner of the table would see nothing under FORCE. To give it away, the
-- owner must for this moment be a member of the role, and the role be able to create in the schema.
GRANT connect_lookup TO CURRENT_USER;
GRANT CREATE ON SCHEMA connect TO connect_lookup;
ALTER FUNCTION connect.spend_registration_token(bytea) OWNER TO connect_lookup;
REVOKE CREATE ON SCHEMA connect FROM connect_lookup;
REVOKE connect_lookup FROM CURRENT_USER;

-- The trust log, and what follows from it. The hub verifies each entry before it stores it, and can make
-- none: what is here is signed by keys that it never has.

CREATE TABLE connect.log_entries (
    workspace_id bytea NOT NULL REFERENCES connect.workspaces,
    -- Entry 0 is the genesis, which is in `workspaces`.
    seq          bigint NOT NULL CHECK (seq > 0),
    hash         bytea NOT NULL CHECK (octet_length(hash) = 32),
    -- LogEntry, as it travels.
    entry        bytea NOT NULL CHECK (octet_length(entry) BETWEEN 1 AND 65536),
    stored_at    timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (workspace_id, seq)
);
CALL connect.isolate('connect.log_entries');
-- DELETE: a recovery, or an owner who settles a fork, replaces the end of the log.
GRANT SELECT, INSERT, DELETE ON connect.log_entries TO connect_app;

-- What was ended on entries that were replaced stays ended, and the entries that are left do not say so:
-- each replacement leaves the state that it led to.
ALTER TABLE connect.workspaces
    -- How often the end of the log was replaced.
    ADD COLUMN replaced bigint NOT NULL DEFAULT 0 CHECK (replaced >= 0),
    -- The trust state after the last replacement.
    ADD COLUMN trust bytea,
    ADD CHECK ((trust IS NULL) = (replaced = 0));
GRANT UPDATE (head_seq, head_hash, replaced, trust) ON connect.workspaces TO connect_app;

-- NULL: the hub never had the invite and saw only a certificate made under it, which its closure keeps.
ALTER TABLE connect.credentials ALTER COLUMN wrap_key DROP NOT NULL;

-- Signed<Certificate> of a higher serial, by a signer: for the agent at its next login.
ALTER TABLE connect.agents ADD COLUMN renewal bytea;

-- One of a new epoch makes those of old epochs useless.
GRANT UPDATE (wrap), DELETE ON connect.wraps TO connect_app;

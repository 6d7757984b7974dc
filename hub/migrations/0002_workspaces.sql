-- What the hub keeps of a workspace. Everything here is public to its members, sealed to the hub, or a
-- public key; `spec/THREAT_MODEL.md` says what the pattern of it tells.
--
-- Each reference names the workspace, so that a row can never point into another one.

CREATE TABLE connect.workspaces (
    workspace_id bytea PRIMARY KEY CHECK (octet_length(workspace_id) = 32),
    -- Signed<Genesis>: the workspace id is the hash of its body.
    genesis      bytea NOT NULL,
    -- The head of the trust log.
    head_seq     bigint NOT NULL DEFAULT 0 CHECK (head_seq >= 0),
    head_hash    bytea NOT NULL CHECK (octet_length(head_hash) = 32),
    created_at   timestamptz NOT NULL DEFAULT now()
);
CALL connect.isolate('connect.workspaces');
GRANT SELECT, INSERT ON connect.workspaces TO connect_app;

CREATE TABLE connect.credentials (
    workspace_id  bytea NOT NULL REFERENCES connect.workspaces,
    credential_id bytea NOT NULL CHECK (octet_length(credential_id) = 16),
    -- Signed<Credential>; the columns below repeat fields of it that queries need.
    credential    bytea NOT NULL,
    -- 1 invite, 2 share.
    kind          smallint NOT NULL CHECK (kind IN (1, 2)),
    uses          bigint NOT NULL CHECK (uses > 0),
    used          bigint NOT NULL DEFAULT 0 CHECK (used BETWEEN 0 AND uses),
    join_until    bigint NOT NULL,
    certs_end     bigint NOT NULL,
    -- The public key to which later epochs are wrapped.
    wrap_key      bytea NOT NULL,
    created_at    timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (workspace_id, credential_id)
);
CALL connect.isolate('connect.credentials');
GRANT SELECT, INSERT, UPDATE (used) ON connect.credentials TO connect_app;

CREATE TABLE connect.agents (
    workspace_id      bytea NOT NULL REFERENCES connect.workspaces,
    agent_id          bytea NOT NULL CHECK (octet_length(agent_id) = 16),
    identity_key      bytea NOT NULL CHECK (octet_length(identity_key) = 32),
    -- Signed<Certificate>, and the credential that it was made under.
    certificate       bytea NOT NULL,
    credential_id     bytea,
    -- Signed<NoiseKey>; neither its counter nor the key at one counter ever changes backwards.
    noise_key         bytea NOT NULL,
    noise_key_counter bigint NOT NULL CHECK (noise_key_counter >= 0),
    static_key        bytea NOT NULL CHECK (octet_length(static_key) = 32),
    wrap_key          bytea NOT NULL,
    -- The sealed AgentRecord, once published.
    record_epoch      bigint,
    record_counter    bigint,
    record            bytea,
    created_at        timestamptz NOT NULL DEFAULT now(),
    last_seen_at      timestamptz NOT NULL DEFAULT now(),
    -- Masked: /24 of IPv4, /48 of IPv6.
    last_address      text NOT NULL,
    PRIMARY KEY (workspace_id, agent_id),
    FOREIGN KEY (workspace_id, credential_id) REFERENCES connect.credentials,
    CHECK (num_nonnulls(record_epoch, record_counter, record) IN (0, 3))
);
CREATE INDEX agents_by_credential ON connect.agents (workspace_id, credential_id);
CALL connect.isolate('connect.agents');
GRANT SELECT, INSERT, UPDATE ON connect.agents TO connect_app;

-- The realm secret and the name key source of an epoch, wrapped to the key of one agent or one credential.
CREATE TABLE connect.wraps (
    workspace_id  bytea NOT NULL REFERENCES connect.workspaces,
    epoch         bigint NOT NULL,
    agent_id      bytea,
    credential_id bytea,
    wrap          bytea NOT NULL,
    FOREIGN KEY (workspace_id, agent_id) REFERENCES connect.agents ON DELETE CASCADE,
    FOREIGN KEY (workspace_id, credential_id) REFERENCES connect.credentials ON DELETE CASCADE,
    CHECK (num_nonnulls(agent_id, credential_id) = 1)
);
CREATE UNIQUE INDEX wraps_by_agent ON connect.wraps (workspace_id, agent_id, epoch) WHERE agent_id IS NOT NULL;
CREATE UNIQUE INDEX wraps_by_credential ON connect.wraps (workspace_id, credential_id, epoch)
    WHERE credential_id IS NOT NULL;
CALL connect.isolate('connect.wraps');
GRANT SELECT, INSERT ON connect.wraps TO connect_app;

CREATE TABLE connect.services (
    workspace_id   bytea NOT NULL REFERENCES connect.workspaces,
    service_id     bytea NOT NULL CHECK (octet_length(service_id) = 16),
    agent_id       bytea NOT NULL,
    -- The keyed hash of the name: equal names in one workspace and epoch have equal tags.
    tag            bytea NOT NULL CHECK (octet_length(tag) = 16),
    record_epoch   bigint NOT NULL,
    record_counter bigint NOT NULL,
    -- The sealed ServiceRecord.
    record         bytea NOT NULL,
    updated_at     timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (workspace_id, service_id),
    UNIQUE (workspace_id, tag),
    FOREIGN KEY (workspace_id, agent_id) REFERENCES connect.agents ON DELETE CASCADE
);
CREATE INDEX services_by_agent ON connect.services (workspace_id, agent_id);
CALL connect.isolate('connect.services');
GRANT SELECT, INSERT, UPDATE, DELETE ON connect.services TO connect_app;

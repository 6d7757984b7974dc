-- Shares: what their signer leaves for the members, and the services that their guests look up.

-- The sealed ShareRecord of a share.
ALTER TABLE connect.credentials ADD COLUMN record bytea;

-- A service once more, as its exposer sealed it for the guests of one share.
CREATE TABLE connect.shared_services (
    workspace_id   bytea NOT NULL REFERENCES connect.workspaces,
    share_id       bytea NOT NULL,
    service_id     bytea NOT NULL,
    -- The keyed hash of the name, under the key of the share.
    tag            bytea NOT NULL CHECK (octet_length(tag) = 16),
    record_epoch   bigint NOT NULL,
    record_counter bigint NOT NULL,
    record         bytea NOT NULL,
    PRIMARY KEY (workspace_id, share_id, service_id),
    FOREIGN KEY (workspace_id, share_id) REFERENCES connect.credentials ON DELETE CASCADE,
    FOREIGN KEY (workspace_id, service_id) REFERENCES connect.services ON DELETE CASCADE
);
CREATE INDEX shared_services_by_service ON connect.shared_services (workspace_id, service_id);
CALL connect.isolate('connect.shared_services');
GRANT SELECT, INSERT, UPDATE (tag, record_epoch, record_counter, record) ON connect.shared_services TO connect_app;

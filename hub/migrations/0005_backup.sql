-- Who may read everything, for backups: under FORCE neither the owner nor anybody else sees a row, and
-- where the database is managed nobody has BYPASSRLS. A dump by a role without a policy would be empty
-- and say nothing of it.

DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = 'connect_backup') THEN
        CREATE ROLE connect_backup NOLOGIN;
    END IF;
    -- `pg_dump --role=connect_backup` needs to become it; a superuser can. Where inheriting can be
    -- switched off, the owner has to become it and sees nothing by the way.
    IF NOT (SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user) THEN
        IF current_setting('server_version_num')::int >= 160000 THEN
            EXECUTE 'GRANT connect_backup TO CURRENT_USER WITH INHERIT FALSE, SET TRUE';
        ELSE
            EXECUTE 'GRANT connect_backup TO CURRENT_USER';
        END IF;
    END IF;
END
$$;
GRANT USAGE ON SCHEMA connect TO connect_backup;

-- As before, and readable for a backup.
CREATE OR REPLACE PROCEDURE connect.isolate(target regclass)
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    mine CONSTANT text :=
        'workspace_id = decode(nullif(current_setting(''connect.workspace_id'', true), ''''), ''hex'')';
BEGIN
    EXECUTE format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY', target);
    EXECUTE format('ALTER TABLE %s FORCE ROW LEVEL SECURITY', target);
    EXECUTE format('CREATE POLICY workspace_select ON %s FOR SELECT TO connect_app USING (%s)', target, mine);
    EXECUTE format('CREATE POLICY workspace_insert ON %s FOR INSERT TO connect_app WITH CHECK (%s)', target, mine);
    EXECUTE format(
        'CREATE POLICY workspace_update ON %s FOR UPDATE TO connect_app USING (%s) WITH CHECK (%s)', target, mine, mine);
    EXECUTE format('CREATE POLICY workspace_delete ON %s FOR DELETE TO connect_app USING (%s)', target, mine);
    EXECUTE format('CREATE POLICY backup_select ON %s FOR SELECT TO connect_backup USING (true)', target);
    EXECUTE format('GRANT SELECT ON %s TO connect_backup', target);
END
$$;

CREATE POLICY backup_select ON connect.workspaces FOR SELECT TO connect_backup USING (true);
CREATE POLICY backup_select ON connect.credentials FOR SELECT TO connect_backup USING (true);
CREATE POLICY backup_select ON connect.agents FOR SELECT TO connect_backup USING (true);
CREATE POLICY backup_select ON connect.wraps FOR SELECT TO connect_backup USING (true);
CREATE POLICY backup_select ON connect.services FOR SELECT TO connect_backup USING (true);
CREATE POLICY backup_select ON connect.log_entries FOR SELECT TO connect_backup USING (true);
CREATE POLICY backup_select ON connect.registration_tokens FOR SELECT TO connect_backup USING (true);
GRANT SELECT ON
    connect.workspaces, connect.credentials, connect.agents, connect.wraps, connect.services,
    connect.log_entries, connect.registration_tokens, connect.schema_history
    TO connect_backup;

-- It was for everybody, and only this role has the grant.
ALTER POLICY add ON connect.registration_tokens TO connect_app;

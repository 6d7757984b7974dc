-- The roles, and the one definition of isolation between workspaces.
--
-- Run as an owner that may create roles. `connect_app` is what the hub serves as: it owns nothing and
-- row security binds it. `connect_lookup` owns the few functions that must see a row before the
-- workspace is known; nobody can log in as it.

DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = 'connect_app') THEN
        CREATE ROLE connect_app LOGIN;
    END IF;
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = 'connect_lookup') THEN
        CREATE ROLE connect_lookup NOLOGIN;
    END IF;
END
$$;

GRANT USAGE ON SCHEMA connect TO connect_app, connect_lookup;
-- The hub compares the version of the schema with its own before it serves.
GRANT SELECT ON connect.schema_history TO connect_app;

-- Closes a table that has a `workspace_id`: with no workspace set, no row is seen and none is written.
-- A pooled session reads '' and not NULL after its first transaction, hence nullif. FORCE binds the
-- owner too; TO connect_app means that any other role sees nothing at all.
CREATE PROCEDURE connect.isolate(target regclass)
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
END
$$;
REVOKE ALL ON PROCEDURE connect.isolate(regclass) FROM PUBLIC;

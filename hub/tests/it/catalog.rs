//! What `connect-hub doctor` finds: nothing in a fresh schema, and each fault that is made in it.

use connect_hub::store::{
    APP_ROLE,
    catalog::{Finding, Kind, Mend, Report, inspect},
};
use sqlx::{
    AssertSqlSafe, Connection as _,
    postgres::{PgConnectOptions, PgConnection},
};

use crate::{
    isolation::{managed_owner, with_bare_cluster, with_cluster},
    process::run,
};

async fn look(options: &PgConnectOptions) -> Report {
    inspect(&mut PgConnection::connect_with(options).await.unwrap()).await.unwrap()
}

async fn execute(connection: &mut PgConnection, sql: &str) {
    sqlx::raw_sql(AssertSqlSafe(sql.to_owned()))
        .execute(connection)
        .await
        .unwrap_or_else(|error| panic!("{sql}: {error}"));
}

#[tokio::test]
async fn the_catalog_has_no_hole() {
    with_cluster(|owner, app| async move {
        for role in [&owner, &app] {
            let report = look(role).await;
            assert_eq!(report.findings, [], "as {}", report.role);
            assert!(report.checked.len() > 5 && report.unseen.len() > 1, "{report:?}");
        }
    })
    .await;
}

#[tokio::test]
async fn the_catalog_of_a_managed_database_has_no_hole() {
    with_bare_cluster(async |cluster| {
        let owner = managed_owner(cluster).await;
        let mut connection = PgConnection::connect_with(&owner).await.unwrap();
        connect_hub::store::migrate(&mut connection).await.unwrap();
        for role in [&owner, &cluster.connect_options(APP_ROLE)] {
            let report = look(role).await;
            assert_eq!(report.findings, [], "as {}", report.role);
        }
    })
    .await;
}

/// A fault: what makes it, which kind of finding it is, and about what.
type Fault = (&'static str, Kind, &'static str);

const FAULTS: &[Fault] = &[
    (
        "CREATE TABLE connect.t (workspace_id bytea REFERENCES connect.workspaces)",
        Kind::NotIsolated,
        "connect.t",
    ),
    ("CREATE TABLE connect.t (note text)", Kind::TableUnknown, "connect.t"),
    (
        "ALTER TABLE connect.agents DISABLE ROW LEVEL SECURITY",
        Kind::NotEnabled,
        "connect.agents",
    ),
    (
        "ALTER TABLE connect.registration_tokens NO FORCE ROW LEVEL SECURITY",
        Kind::NotForced,
        "connect.registration_tokens",
    ),
    (
        "DROP POLICY workspace_delete ON connect.wraps",
        Kind::PolicyMissing,
        "connect.wraps",
    ),
    ("DROP POLICY backup_select ON connect.wraps", Kind::PolicyMissing, "connect.wraps"),
    (
        "ALTER POLICY workspace_select ON connect.services TO PUBLIC",
        Kind::PolicyChanged,
        "connect.services",
    ),
    (
        "ALTER POLICY workspace_update ON connect.services WITH CHECK (true)",
        Kind::PolicyChanged,
        "connect.services",
    ),
    (
        "DROP POLICY workspace_select ON connect.agents;
         CREATE POLICY workspace_select ON connect.agents FOR SELECT TO connect_app
         USING (workspace_id = decode(current_setting('connect.workspace_id', true), 'hex'))",
        Kind::PolicyChanged,
        "connect.agents",
    ),
    (
        "CREATE FUNCTION public.decode(text, text) RETURNS bytea LANGUAGE sql AS 'SELECT NULL::bytea';
         ALTER POLICY workspace_select ON connect.agents
         USING (workspace_id = public.decode(nullif(current_setting('connect.workspace_id', true), ''), 'hex'))",
        Kind::PolicyChanged,
        "connect.agents",
    ),
    (
        "CREATE POLICY \"see all\" ON connect.agents FOR SELECT TO connect_app USING (true)",
        Kind::PolicyUnknown,
        "connect.agents",
    ),
    ("GRANT DELETE ON connect.agents TO connect_app", Kind::Grant, "connect.agents"),
    (
        "GRANT UPDATE (genesis) ON connect.workspaces TO connect_app",
        Kind::Grant,
        "connect.workspaces",
    ),
    (
        "GRANT SELECT ON connect.registration_tokens TO PUBLIC",
        Kind::Grant,
        "connect.registration_tokens",
    ),
    ("REVOKE INSERT ON connect.agents FROM connect_app", Kind::Grant, "connect.agents"),
    ("REVOKE SELECT ON connect.agents FROM connect_backup", Kind::Grant, "connect.agents"),
    ("GRANT CREATE ON SCHEMA connect TO connect_app", Kind::Grant, "schema connect"),
    ("GRANT USAGE ON SCHEMA connect TO PUBLIC", Kind::Grant, "schema connect"),
    ("REVOKE USAGE ON SCHEMA connect FROM connect_lookup", Kind::Grant, "schema connect"),
    (
        "CREATE SEQUENCE connect.s; GRANT SELECT ON connect.s TO connect_app",
        Kind::Grant,
        "connect.s",
    ),
    (
        "CREATE FUNCTION connect.f() RETURNS bigint LANGUAGE sql SECURITY DEFINER
         SET search_path = pg_catalog, pg_temp AS 'SELECT count(*) FROM connect.agents'",
        Kind::Function,
        "connect.f()",
    ),
    (
        "GRANT connect_lookup TO postgres; CREATE FUNCTION public.f() RETURNS bigint LANGUAGE sql
         SECURITY DEFINER AS 'SELECT 1::bigint'; ALTER FUNCTION public.f() OWNER TO connect_lookup;
         REVOKE connect_lookup FROM postgres",
        Kind::Owner,
        "role connect_lookup",
    ),
    (
        "ALTER FUNCTION connect.spend_registration_token(bytea) RESET search_path",
        Kind::Function,
        "connect.spend_registration_token(bytea)",
    ),
    (
        "ALTER FUNCTION connect.spend_registration_token(bytea) OWNER TO postgres",
        Kind::Function,
        "connect.spend_registration_token(bytea)",
    ),
    (
        "GRANT EXECUTE ON FUNCTION connect.spend_registration_token(bytea) TO PUBLIC",
        Kind::Function,
        "connect.spend_registration_token(bytea)",
    ),
    (
        "REVOKE EXECUTE ON FUNCTION connect.spend_registration_token(bytea) FROM connect_app",
        Kind::Function,
        "connect.spend_registration_token(bytea)",
    ),
    (
        "GRANT EXECUTE ON PROCEDURE connect.isolate(regclass) TO PUBLIC",
        Kind::Function,
        "connect.isolate(regclass)",
    ),
    (
        "ALTER TABLE connect.agents ADD UNIQUE (agent_id)",
        Kind::Unique,
        "connect.agents",
    ),
    (
        "CREATE UNIQUE INDEX i ON connect.agents (md5(agent_id))",
        Kind::Unique,
        "connect.agents",
    ),
    (
        "CREATE UNIQUE INDEX i ON connect.agents (agent_id) INCLUDE (workspace_id)",
        Kind::Unique,
        "connect.agents",
    ),
    ("ALTER ROLE connect_app SUPERUSER", Kind::Role, "role connect_app"),
    ("ALTER ROLE connect_app BYPASSRLS", Kind::Role, "role connect_app"),
    ("ALTER ROLE connect_app CREATEROLE", Kind::Role, "role connect_app"),
    ("ALTER ROLE connect_app REPLICATION", Kind::Role, "role connect_app"),
    ("ALTER ROLE connect_backup LOGIN", Kind::Role, "role connect_backup"),
    ("ALTER ROLE connect_lookup LOGIN", Kind::Role, "role connect_lookup"),
    ("GRANT connect_backup TO connect_app", Kind::Membership, "role connect_app"),
    ("GRANT pg_read_all_stats TO connect_app", Kind::Membership, "role connect_app"),
    (
        "CREATE ROLE someone; GRANT connect_lookup TO someone",
        Kind::Membership,
        "role someone",
    ),
    (
        "ALTER TABLE connect.services OWNER TO connect_app",
        Kind::Owner,
        "connect.services",
    ),
    (
        "CREATE SCHEMA other AUTHORIZATION connect_app",
        Kind::Owner,
        "role connect_app",
    ),
    (
        "ALTER ROLE connect_app SET connect.workspace_id = 'aa'",
        Kind::Setting,
        "role connect_app",
    ),
    (
        "ALTER DATABASE connect SET connect.workspace_id = 'aa'",
        Kind::Setting,
        "database connect",
    ),
    ("CREATE VIEW public.v AS SELECT * FROM connect.agents", Kind::View, "public.v"),
    (
        "CREATE MATERIALIZED VIEW connect.v AS SELECT count(*) FROM connect.agents",
        Kind::View,
        "connect.v",
    ),
    (
        "CREATE RULE r AS ON DELETE TO connect.wraps DO ALSO NOTHING",
        Kind::Oddity,
        "connect.wraps",
    ),
    ("CREATE TABLE public.heir () INHERITS (connect.wraps)", Kind::Oddity, "public.heir"),
    (
        "CREATE FUNCTION public.f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
         CREATE TRIGGER \"a copy\" AFTER INSERT ON connect.services
         FOR EACH ROW EXECUTE FUNCTION public.f()",
        Kind::Oddity,
        "connect.services",
    ),
    (
        "CREATE TABLE connect.t (workspace_id bytea); CALL connect.isolate('connect.t')",
        Kind::ForeignKey,
        "connect.t",
    ),
    (
        "ALTER TABLE connect.services DROP CONSTRAINT services_workspace_id_agent_id_fkey",
        Kind::ForeignKey,
        "connect.services",
    ),
    (
        "ALTER TABLE connect.agents DROP CONSTRAINT agents_workspace_id_fkey",
        Kind::ForeignKey,
        "connect.agents",
    ),
    (
        "ALTER TABLE connect.api_keys DROP CONSTRAINT api_keys_workspace_id_agent_id_fkey;
         ALTER TABLE connect.api_keys ADD FOREIGN KEY (workspace_id, agent_id)
         REFERENCES connect.agents ON DELETE CASCADE NOT VALID",
        Kind::ForeignKey,
        "connect.api_keys",
    ),
    ("ALTER TABLE connect.wraps DISABLE TRIGGER ALL", Kind::ForeignKey, "connect.wraps"),
    (
        "ALTER TABLE connect.agents DROP CONSTRAINT agents_workspace_id_credential_id_fkey;
         ALTER TABLE connect.agents ADD CONSTRAINT other FOREIGN KEY (workspace_id, credential_id)
         REFERENCES connect.credentials ON DELETE CASCADE",
        Kind::ForeignKey,
        "connect.agents",
    ),
    (
        "CREATE OR REPLACE FUNCTION connect.workspace_of_api_key(hash bytea) RETURNS bytea
         LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
         AS 'SELECT workspace_id FROM connect.api_keys LIMIT 1'",
        Kind::Function,
        "connect.workspace_of_api_key(bytea)",
    ),
    (
        "CREATE OR REPLACE FUNCTION connect.append_audit(events text[]) RETURNS void
         LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS 'BEGIN END'",
        Kind::Function,
        "connect.append_audit(text[])",
    ),
    (
        "CREATE OR REPLACE PROCEDURE connect.isolate(target regclass) LANGUAGE plpgsql
         SET search_path = pg_catalog, pg_temp AS 'BEGIN END'",
        Kind::Function,
        "connect.isolate(regclass)",
    ),
    (
        "CREATE UNLOGGED TABLE connect.t (workspace_id bytea REFERENCES connect.workspaces);
         CALL connect.isolate('connect.t')",
        Kind::Oddity,
        "connect.t",
    ),
];

/// The one foreign key fault needs a uniqueness to refer to, so it brings two findings.
const WRONG_REFERENCE: &str = "
    CREATE TABLE connect.t (workspace_id bytea REFERENCES connect.workspaces, service_id bytea);
    CALL connect.isolate('connect.t');
    ALTER TABLE connect.services ADD CONSTRAINT over_all UNIQUE (service_id);
    ALTER TABLE connect.t ADD CONSTRAINT to_service FOREIGN KEY (service_id)
    REFERENCES connect.services (service_id)";

#[tokio::test]
async fn each_fault_is_found_and_mended_by_the_sql_that_comes_with_it() {
    with_cluster(|owner, _| async move {
        let mut connection = PgConnection::connect_with(&owner).await.unwrap();
        for (fault, kind, object) in FAULTS {
            execute(&mut connection, fault).await;
            let report = look(&owner).await;
            let [Finding { kind: found, object: of, mend: Mend::Sql(sql), .. }] =
                report.findings.as_slice()
            else {
                panic!("{fault}: {:?}", report.findings);
            };
            assert_eq!((found, of.as_str()), (kind, *object), "{fault}");
            execute(&mut connection, sql).await;
            let after = look(&owner).await.findings;
            assert_eq!(after, [], "{fault} was to be mended by {sql}");
            execute(
                &mut connection,
                "DROP TABLE IF EXISTS connect.t, public.t; DROP SEQUENCE IF EXISTS connect.s;
                 DROP FUNCTION IF EXISTS connect.f, public.f, public.decode(text, text);
                 DROP TABLE IF EXISTS public.heir; DROP SCHEMA IF EXISTS other",
            )
            .await;
        }

        execute(&mut connection, WRONG_REFERENCE).await;
        let kinds = |report: &Report| report.findings.iter().map(|f| f.kind).collect::<Vec<_>>();
        let report = look(&owner).await;
        assert_eq!(kinds(&report), [Kind::ForeignKey, Kind::Unique]);
        for finding in report.findings {
            let Mend::Sql(sql) = finding.mend else { panic!("{}", finding.problem) };
            execute(&mut connection, &sql).await;
        }
        assert_eq!(look(&owner).await.findings, []);
    })
    .await;
}

#[tokio::test]
async fn another_version_of_the_schema_is_found() {
    with_cluster(|owner, app| async move {
        let mut connection = PgConnection::connect_with(&owner).await.unwrap();
        for (change, says) in [
            (
                "UPDATE connect.schema_history SET version = 999999 WHERE version = (SELECT max(version) FROM connect.schema_history)",
                "upgrade this one",
            ),
            ("DELETE FROM connect.schema_history WHERE version = 999999", "connect-hub migrate"),
        ] {
            execute(&mut connection, change).await;
            let report = look(&app).await;
            let [Finding { kind: Kind::SchemaVersion, mend: Mend::Advice(advice), .. }] =
                report.findings.as_slice()
            else {
                panic!("{:?}", report.findings);
            };
            assert!(advice.contains(says), "{advice}");
        }
        execute(&mut connection, "DROP SCHEMA connect CASCADE").await;
        let findings = look(&app).await.findings;
        assert_eq!(findings.len(), 1, "{findings:?}");
        assert_eq!(findings[0].kind, Kind::SchemaVersion);
    })
    .await;
}

#[tokio::test]
async fn doctor_says_what_it_saw_and_ends_with_its_findings() {
    let (_dir, data_dir) = crate::template::place().await;
    let dir = data_dir.to_str().unwrap();
    let migrated = run(&["migrate", "--data-dir", dir]).await;
    assert!(migrated.status.success());

    let clean = run(&["doctor", "--data-dir", dir]).await;
    let said = String::from_utf8(clean.stdout).unwrap();
    assert_eq!(clean.status.code(), Some(0), "{said}");
    for part in ["checked   tables: agents", "not seen  ", "nothing to mend"] {
        assert!(said.contains(part), "{said}");
    }

    let hub = crate::process::HubProcess::start(&data_dir).await;
    let mut superuser = PgConnection::connect_with(
        &connect_hub::cluster::connect_options(&data_dir, "postgres").unwrap(),
    )
    .await
    .unwrap();
    execute(&mut superuser, "GRANT DELETE ON connect.agents TO connect_app").await;
    let found = run(&["doctor", "--data-dir", dir]).await;
    let said = String::from_utf8(found.stdout).unwrap();
    assert_eq!(found.status.code(), Some(1), "{said}");
    assert!(said.contains("FOUND     connect.agents: connect_app has DELETE"), "{said}");
    assert!(said.contains("REVOKE DELETE ON connect.agents FROM connect_app;"), "{said}");

    let json = run(&["doctor", "--json", "--data-dir", dir]).await;
    assert_eq!(json.status.code(), Some(1));
    let report: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(report["findings"][0]["kind"], "grant");
    assert_eq!(
        report["findings"][0]["mend"]["sql"],
        "REVOKE DELETE ON connect.agents FROM connect_app;"
    );
    hub.stop().await;

    for usage in [vec!["doctor", "--nonsense"], vec!["doctor", "--data-dir", "/nowhere"]] {
        assert_eq!(run(&usage).await.status.code(), Some(2), "{usage:?}");
    }
}

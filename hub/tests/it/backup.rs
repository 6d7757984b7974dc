//! Backups and the way back: every row, and the schema as the migrations make it.

use std::{fs, path::Path};

use connect_hub::{
    backup::{BackupError, Rows, backup, restore},
    store::{self, APP_ROLE, Store, catalog},
};
use connect_spec::control::{FromHub, RegistrationToken};
use sqlx::{
    AssertSqlSafe, Connection as _,
    postgres::{PgConnectOptions, PgConnection},
};

use crate::{
    client::{Control, Workspace},
    isolation::{A, B, managed_owner, populate, with_bare_cluster, with_cluster},
    process::{HubProcess, run, stderr},
    template::place,
};

/// All rows, and what the catalogue says of who may see them, as text.
async fn everything(superuser: &PgConnectOptions) -> Vec<String> {
    let mut connection = PgConnection::connect_with(superuser).await.unwrap();
    let mut all: Vec<(String,)> = sqlx::query_as(
        "SELECT format('%s %s %s %s %s', c.relname, c.relrowsecurity, c.relforcerowsecurity, c.relowner::regrole,
                       (SELECT string_agg(acl::text, ' ' ORDER BY acl::text) FROM unnest(c.relacl) acl))
         FROM pg_class c WHERE c.relnamespace = 'connect'::regnamespace AND c.relkind = 'r'
         UNION ALL SELECT p::text FROM pg_policies p WHERE schemaname = 'connect'
         UNION ALL SELECT format('%s %s %s %s', p.oid::regprocedure, p.proowner::regrole, p.proacl, p.proconfig)
         FROM pg_proc p WHERE p.pronamespace = 'connect'::regnamespace
         UNION ALL SELECT format('%s %s', version, checksum) FROM connect.schema_history
         ORDER BY 1",
    )
    .fetch_all(&mut connection)
    .await
    .unwrap();
    let tables: Vec<(String,)> = sqlx::query_as(
        "SELECT c.oid::regclass::text FROM pg_class c WHERE c.relnamespace = 'connect'::regnamespace
         AND c.relkind = 'r' AND c.relname <> 'schema_history' ORDER BY 1",
    )
    .fetch_all(&mut connection)
    .await
    .unwrap();
    for (table,) in tables {
        let rows = AssertSqlSafe(format!("SELECT '{table} ' || t::text FROM {table} t ORDER BY 1"));
        let rows: Vec<(String,)> = sqlx::query_as(rows).fetch_all(&mut connection).await.unwrap();
        all.extend(rows);
    }
    all.into_iter().map(|(text,)| text).collect()
}

/// Rows in every table, among them text that is hard on a file format.
async fn fill(app: &PgConnectOptions) {
    let store = Store::connect(app.clone()).await.unwrap();
    populate(&store, A).await;
    populate(&store, B).await;
    store.close().await;
    let mut connection = PgConnection::connect_with(app).await.unwrap();
    let token = RegistrationToken("token".to_owned());
    store::create_token(&mut connection, &token, std::time::Duration::from_secs(60)).await.unwrap();
    let odd = format!(
        "BEGIN; SELECT set_config('connect.workspace_id', '{A}', true);
         UPDATE connect.agents SET last_address = E'\\\\.\\n\\t\\\\N \\r''; -- \u{e9}'; COMMIT"
    );
    sqlx::raw_sql(AssertSqlSafe(odd)).execute(&mut connection).await.unwrap();
    connection.close().await.unwrap();
}

fn rows_of(rows: &Rows, table: &str) -> i64 {
    rows.iter().find(|(name, _)| name == table).unwrap().1
}

#[tokio::test]
async fn a_managed_owner_backs_up_and_restores_every_row() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("hub.backup");
    let mut before = Vec::new();
    with_bare_cluster(async |cluster| {
        let owner = managed_owner(cluster).await;
        store::migrate(&mut store::open(&owner).await.unwrap()).await.unwrap();
        fill(&cluster.connect_options(APP_ROLE)).await;
        before = everything(&cluster.connect_options("postgres")).await;
        let rows = backup(&owner, &file).await.unwrap();
        assert_eq!(rows_of(&rows, "workspaces"), 2);
        assert_eq!(rows_of(&rows, "registration_tokens"), 1);
        assert!(rows.iter().all(|(_, rows)| *rows > 0), "{rows:?}");
        use std::os::unix::fs::PermissionsExt as _;
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);

        // Not over what is there, and with leave to do so the same again.
        let refused = restore(&owner, &file, false).await;
        assert!(matches!(refused, Err(BackupError::NotEmpty)), "{refused:?}");
        assert_eq!(everything(&cluster.connect_options("postgres")).await, before);
        restore(&owner, &file, true).await.unwrap();
        assert_eq!(everything(&cluster.connect_options("postgres")).await, before);
        // A hub that is connected would go on with what is gone.
        let store = Store::connect(cluster.connect_options(APP_ROLE)).await.unwrap();
        let refused = restore(&owner, &file, true).await;
        assert!(matches!(refused, Err(BackupError::InUse(_))), "{refused:?}");
        store.close().await;
        // The hub's own role can make no backup.
        let app = cluster.connect_options(APP_ROLE);
        assert!(matches!(backup(&app, &file).await, Err(BackupError::NotOwner)));
    })
    .await;

    // By PostgreSQL's own program, as README.md tells.
    with_bare_cluster(async |cluster| {
        managed_owner(cluster).await;
        let superuser = cluster.connect_options("postgres");
        let roles = "CREATE ROLE connect_app LOGIN; CREATE ROLE connect_lookup;
             CREATE ROLE connect_backup; CREATE ROLE connect_audit";
        let mut connection = PgConnection::connect_with(&superuser).await.unwrap();
        sqlx::raw_sql(roles).execute(&mut connection).await.unwrap();
        let program = connect_hub::cluster::client_program("pg_restore", 0).await.unwrap();
        let restored = tokio::process::Command::new(program)
            .args(["--exit-on-error", "--username=postgres", "--dbname=connect", "--host"])
            .arg(superuser.get_socket().unwrap())
            .arg(&file)
            .output()
            .await
            .unwrap();
        assert!(restored.status.success(), "{}", stderr(&restored));
        assert_eq!(everything(&superuser).await, before);
        assert_eq!(catalog::inspect(&mut connection).await.unwrap().findings, []);
    })
    .await;

    with_bare_cluster(async |cluster| {
        let owner = managed_owner(cluster).await;
        let rows = restore(&owner, &file, false).await.unwrap();
        assert_eq!(rows_of(&rows, "agents"), 2);
        assert_eq!(everything(&cluster.connect_options("postgres")).await, before);
        let report = catalog::inspect(&mut store::open(&owner).await.unwrap()).await.unwrap();
        assert_eq!(report.findings, []);
        Store::connect(cluster.connect_options(APP_ROLE)).await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_backup_is_whole_or_is_none() {
    with_cluster(|owner, app| async move {
        fill(&app).await;
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("hub.backup");
        backup(&owner, &file).await.unwrap();
        let good = fs::read(&file).unwrap();

        // A role that sees nothing must not make an empty backup.
        let mut superuser = PgConnection::connect_with(&owner).await.unwrap();
        for (blind, mend) in [
            (
                "DROP POLICY backup_select ON connect.agents",
                "CREATE POLICY backup_select ON connect.agents FOR SELECT TO connect_backup USING (true)",
            ),
            (
                "CREATE POLICY less ON connect.agents AS RESTRICTIVE USING (record_epoch IS NULL)",
                "DROP POLICY less ON connect.agents",
            ),
            (
                "REVOKE SELECT ON connect.agents FROM connect_backup",
                "GRANT SELECT ON connect.agents TO connect_backup",
            ),
        ] {
            sqlx::raw_sql(blind).execute(&mut superuser).await.unwrap();
            match backup(&owner, &file).await {
                Err(BackupError::Blind(table)) => assert_eq!(table, "agents"),
                other => panic!("{blind}: {other:?}"),
            }
            sqlx::raw_sql(mend).execute(&mut superuser).await.unwrap();
        }
        assert_eq!(fs::read(&file).unwrap(), good, "a failed backup replaced a good one");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "something was left behind");

        // Nothing is changed by a file that is none, or of which a part is missing.
        let before = everything(&owner).await;
        for broken in [b"nonsense".to_vec(), Vec::new(), good[..good.len() / 2].to_vec()] {
            fs::write(&file, broken).unwrap();
            let refused = restore(&owner, &file, true).await;
            assert!(
                matches!(refused, Err(BackupError::NoBackup { .. } | BackupError::Program { .. })),
                "{refused:?}"
            );
            assert_eq!(everything(&owner).await, before);
        }
        // Of a later schema than this program knows.
        let later = "UPDATE connect.schema_history SET version = 999999
                     WHERE version = (SELECT max(version) FROM connect.schema_history)";
        fs::write(&file, good).unwrap();
        sqlx::raw_sql(later).execute(&mut superuser).await.unwrap();
        let refused = backup(&owner, &file).await;
        assert!(matches!(refused, Err(BackupError::Version { found: 999_999, .. })), "{refused:?}");
    })
    .await;
}

async fn ok(args: &[&str]) -> String {
    let output = run(args).await;
    assert!(output.status.success(), "{args:?}: {}", stderr(&output));
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test]
async fn the_private_database_is_saved_while_the_hub_runs() {
    let (_dir, data_dir) = place().await;
    let (_other_dir, other_dir) = place().await;
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let (dir, other) = (text(&data_dir), text(&other_dir));
    let files = tempfile::tempdir().unwrap();
    let file = text(&files.path().join("hub.backup"));

    let hub = HubProcess::start(&data_dir).await;
    let workspace = Workspace::new();
    let founder = workspace.founder();
    let control = Control::log_in(hub.agents, &workspace, &founder).await;
    let said = ok(&["backup", &file, "--data-dir", &dir]).await;
    assert!(said.contains("workspaces 1\n") && said.contains("agents 1\n"), "{said}");
    // Under a running hub nothing is replaced.
    let refused = run(&["restore", &file, "--replace", "--data-dir", &dir]).await;
    assert_eq!(refused.status.code(), Some(1));
    assert!(stderr(&refused).contains("another connect-hub"), "{}", stderr(&refused));
    drop(control);
    hub.stop().await;
    // And while it does not run.
    let again = ok(&["backup", &file, "--data-dir", &dir]).await;
    assert_eq!(again, said);

    assert!(ok(&["restore", &file, "--data-dir", &other]).await.contains("workspaces 1\n"));
    let refused = run(&["restore", &file, "--data-dir", &other]).await;
    assert!(stderr(&refused).contains("--replace"), "{}", stderr(&refused));
    ok(&["restore", &file, "--replace", "--data-dir", &other]).await;
    ok(&["doctor", "--data-dir", &other]).await;
    let hub = HubProcess::start(&other_dir).await;
    let mut control = Control::connect(hub.agents).await;
    assert!(matches!(control.try_log_in(&founder, |_| ()).await, FromHub::Welcome { .. }));
    hub.stop().await;
}

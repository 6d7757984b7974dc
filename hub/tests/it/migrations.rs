//! Migrations over data, by an owner whom row security binds.

use connect_hub::{
    backup::{backup, restore},
    store::{self, APP_ROLE, Store, catalog},
};
use sqlx::{
    AssertSqlSafe, Connection as _,
    postgres::{PgConnectOptions, PgConnection},
};

use crate::isolation::{A, B, managed_owner, with_bare_cluster};

/// The version of the first schema that hubs in use have.
const OLD: i64 = 4;

/// The first version whose data can be backed up.
const FIRST_SAVED: i64 = 5;

/// Statements that put a row into each table of version [`OLD`], as the hub did then.
const ROWS: &str = "
    INSERT INTO connect.workspaces (workspace_id, genesis, head_hash, replaced, trust)
    VALUES (W, 'genesis', W, 1, 'state');
    INSERT INTO connect.credentials (workspace_id, credential_id, credential, kind, uses, join_until, certs_end)
    VALUES (W, decode(repeat('03', 16), 'hex'), 'credential', 1, 1, 10, 20);
    INSERT INTO connect.agents (workspace_id, agent_id, identity_key, certificate, credential_id, noise_key,
                                noise_key_counter, static_key, wrap_key, last_address)
    VALUES (W, decode(repeat('01', 16), 'hex'), W, 'certificate', decode(repeat('03', 16), 'hex'), 'key', 1, W,
            'wrap key', '192.0.2.0/24');
    INSERT INTO connect.wraps (workspace_id, epoch, agent_id, wrap)
    VALUES (W, 0, decode(repeat('01', 16), 'hex'), 'wrap');
    INSERT INTO connect.services (workspace_id, service_id, agent_id, tag, record_epoch, record_counter, record)
    VALUES (W, decode(repeat('04', 16), 'hex'), decode(repeat('01', 16), 'hex'), decode(repeat('05', 16), 'hex'),
            0, 1, 'record');
    INSERT INTO connect.log_entries (workspace_id, seq, hash, entry) VALUES (W, 1, W, 'entry');";

const TABLES: [&str; 7] = [
    "workspaces",
    "credentials",
    "agents",
    "wraps",
    "services",
    "log_entries",
    "registration_tokens",
];

async fn execute(connection: &mut PgConnection, sql: &str) {
    sqlx::raw_sql(AssertSqlSafe(sql.to_owned()))
        .execute(connection)
        .await
        .unwrap_or_else(|error| panic!("{sql}: {error}"));
}

/// The rows of the old tables, without columns that came later.
async fn rows(superuser: &PgConnectOptions) -> Vec<(String, i64, Option<String>)> {
    let mut connection = PgConnection::connect_with(superuser).await.unwrap();
    let mut rows = Vec::new();
    for table in TABLES {
        let key = if table == "registration_tokens" { "token_hash" } else { "workspace_id" };
        let sql = format!(
            "SELECT '{table}', count(*), string_agg({key}::text, ' ' ORDER BY {key}) FROM connect.{table}"
        );
        rows.push(sqlx::query_as(AssertSqlSafe(sql)).fetch_one(&mut connection).await.unwrap());
    }
    rows
}

#[tokio::test]
async fn an_owner_whom_row_security_binds_migrates_and_loses_nothing() {
    with_bare_cluster(async |cluster| {
        let owner = managed_owner(cluster).await;
        let (app, superuser) =
            (cluster.connect_options(APP_ROLE), cluster.connect_options("postgres"));
        let mut connection = store::open(&owner).await.unwrap();
        store::migrate_to(&mut connection, OLD).await.unwrap();
        assert_eq!(store::version(&mut connection).await.unwrap(), OLD);
        let mut hub = PgConnection::connect_with(&app).await.unwrap();
        for workspace in [A, B] {
            let id = format!("decode('{workspace}', 'hex')");
            let inserts = ROWS.replace("(W", &format!("({id}")).replace(", W", &format!(", {id}"));
            let sql = format!(
                "BEGIN; SELECT set_config('connect.workspace_id', '{workspace}', true); {inserts} COMMIT"
            );
            execute(&mut hub, &sql).await;
        }
        execute(
            &mut hub,
            "INSERT INTO connect.registration_tokens (token_hash, expires_at)
             VALUES (sha256('token'), now() + interval '1 day')",
        )
        .await;
        let before = rows(&superuser).await;
        let counts: Vec<i64> = before.iter().map(|(_, count, _)| *count).collect();
        assert_eq!(counts, [2, 2, 2, 2, 2, 2, 1]);

        // A backup of the oldest version that can be saved, for later.
        store::migrate_to(&mut connection, FIRST_SAVED).await.unwrap();
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("old.backup");
        backup(&owner, &file).await.unwrap();

        store::migrate(&mut connection).await.unwrap();
        assert_eq!(rows(&superuser).await, before);
        // FORCE is back wherever a migration lifted it.
        assert_eq!(catalog::inspect(&mut connection).await.unwrap().findings, []);
        // And the hub serves what it served.
        let store = Store::connect(app).await.unwrap();
        let mut tx = store.workspace(A).await.unwrap();
        assert_eq!(tx.find_workspace().await.unwrap().unwrap().genesis, b"genesis");
        drop(tx);
        store.close().await;
        hub.close().await.unwrap();

        // The old backup is brought up to date on its way back.
        restore(&owner, &file, true).await.unwrap();
        assert_eq!(rows(&superuser).await, before);
        assert_eq!(store::version(&mut connection).await.unwrap(), store::latest_version());
        assert_eq!(catalog::inspect(&mut connection).await.unwrap().findings, []);
    })
    .await;
}

#[tokio::test]
async fn a_migration_that_moves_rows_lifts_force_in_its_transaction() {
    with_bare_cluster(async |cluster| {
        let owner = managed_owner(cluster).await;
        let mut connection = store::open(&owner).await.unwrap();
        store::migrate(&mut connection).await.unwrap();
        let app = cluster.connect_options(APP_ROLE);
        let store = Store::connect(app.clone()).await.unwrap();
        for workspace in [A, B] {
            let mut tx = store.workspace(workspace).await.unwrap();
            assert!(tx.insert_workspace(b"genesis").await.unwrap());
            tx.commit().await.unwrap();
        }
        let table =
            "CREATE TABLE connect.t (workspace_id bytea PRIMARY KEY REFERENCES connect.workspaces)";
        execute(&mut connection, table).await;
        execute(&mut connection, "CALL connect.isolate('connect.t')").await;

        // Where the owner inherits nothing (since version 16) it sees no row; before that it sees them
        // as a member of connect_backup. It may write none in any version.
        let (inherits,): (bool,) = sqlx::query_as("SELECT pg_has_role('connect_backup', 'USAGE')")
            .fetch_one(&mut connection)
            .await
            .unwrap();
        let naive =
            sqlx::query("INSERT INTO connect.t SELECT workspace_id FROM connect.workspaces")
                .execute(&mut connection)
                .await;
        if inherits {
            assert!(naive.unwrap_err().to_string().contains("row-level security"));
        } else {
            assert_eq!(naive.unwrap().rows_affected(), 0, "rows that nobody was to see were moved");
        }

        // What ARCHITECTURE.md tells to do.
        let mut other = PgConnection::connect_with(&app).await.unwrap();
        let mut tx = connection.begin().await.unwrap();
        execute(
            &mut tx,
            "ALTER TABLE connect.workspaces NO FORCE ROW LEVEL SECURITY;
             ALTER TABLE connect.t NO FORCE ROW LEVEL SECURITY;
             INSERT INTO connect.t SELECT workspace_id FROM connect.workspaces;
             ALTER TABLE connect.t FORCE ROW LEVEL SECURITY;
             ALTER TABLE connect.workspaces FORCE ROW LEVEL SECURITY",
        )
        .await;
        tx.commit().await.unwrap();
        let superuser = cluster.connect_options("postgres");
        let mut superuser = PgConnection::connect_with(&superuser).await.unwrap();
        let (moved,): (i64,) = sqlx::query_as("SELECT count(*) FROM connect.t")
            .fetch_one(&mut superuser)
            .await
            .unwrap();
        assert_eq!(moved, 2);
        assert_eq!(catalog::inspect(&mut connection).await.unwrap().findings, []);
        let (seen,): (i64,) = sqlx::query_as("SELECT count(*) FROM connect.workspaces")
            .fetch_one(&mut other)
            .await
            .unwrap();
        assert_eq!(seen, 0);

        // A migration that fails between leaves FORCE as it was.
        let mut tx = connection.begin().await.unwrap();
        execute(&mut tx, "ALTER TABLE connect.t NO FORCE ROW LEVEL SECURITY").await;
        tx.rollback().await.unwrap();
        assert_eq!(catalog::inspect(&mut connection).await.unwrap().findings, []);
    })
    .await;
}

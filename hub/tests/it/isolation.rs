//! What one workspace sees of another, and of the hub's own state: nothing.

use std::{future::Future, panic::AssertUnwindSafe, time::Duration};

use connect_hub::{
    audit::now,
    cluster::{Cluster, DataDir, connect_options},
    limits::{
        MAX_AGENTS_PER_WORKSPACE, MAX_SERVICES_PER_AGENT, MAX_SERVICES_PER_WORKSPACE,
        TRANSACTIONS_PER_WORKSPACE,
    },
    store::{
        APP_ROLE, AgentLogin, Exposed, NewCredential, Opening, Store, StoreError, Upserted,
        WorkspaceTx, create_token, latest_version, migrate,
    },
};
use connect_spec::{
    audit::{Event, Scope},
    control::{ApiKey, EpochWrap, ErrorCode, PresentedBlobs, RegistrationToken, SealedRecord},
    ids::{AgentId, CredentialId, LookupTag, ServiceId, WorkspaceId},
    keys::{IdentityKey, Signature, StaticPublicKey},
    log::{Change, Entry, EntryHash, LogEntry, Policy},
    objects::CredentialKind,
    signed::{Body as _, Signed},
};
use futures_util::FutureExt as _;
use sqlx::{
    Connection as _,
    postgres::{PgConnectOptions, PgConnection},
};

use crate::{
    client::{Control, error_code},
    template::place,
    tunnels::World,
};

pub(crate) const A: WorkspaceId = WorkspaceId([0xaa; 32]);
pub(crate) const B: WorkspaceId = WorkspaceId([0xbb; 32]);
pub(crate) const AGENT: AgentId = AgentId([1; 16]);
const OTHER_AGENT: AgentId = AgentId([2; 16]);
pub(crate) const CREDENTIAL: CredentialId = CredentialId([3; 16]);
pub(crate) const SERVICE: ServiceId = ServiceId([4; 16]);
pub(crate) const TAG: LookupTag = LookupTag([5; 16]);

/// Runs a test on a cluster of its own, which is gone afterwards whatever happened.
pub(crate) async fn with_cluster<T: Future<Output = ()>>(
    test: impl FnOnce(PgConnectOptions, PgConnectOptions) -> T,
) {
    with_bare_cluster(async |cluster| {
        let owner = cluster.connect_options("postgres");
        let mut connection = PgConnection::connect_with(&owner).await.unwrap();
        migrate(&mut connection).await.unwrap();
        test(owner, cluster.connect_options(APP_ROLE)).await;
    })
    .await;
}

/// The same without a schema.
pub(crate) async fn with_bare_cluster(test: impl AsyncFnOnce(&Cluster)) {
    let (_dir, data_dir) = place().await;
    let cluster = Cluster::start(DataDir::lock(&data_dir).unwrap()).await.unwrap();
    let outcome = AssertUnwindSafe(test(&cluster)).catch_unwind().await;
    cluster.stop().await;
    if let Err(panic) = outcome {
        std::panic::resume_unwind(panic);
    }
}

/// An owner as managed databases have it: no superuser, no BYPASSRLS.
pub(crate) async fn managed_owner(cluster: &Cluster) -> PgConnectOptions {
    let superuser = cluster.connect_options("postgres");
    let mut superuser = PgConnection::connect_with(&superuser).await.unwrap();
    sqlx::raw_sql(
        "CREATE ROLE hub_owner LOGIN CREATEROLE; GRANT CREATE ON DATABASE connect TO hub_owner",
    )
    .execute(&mut superuser)
    .await
    .unwrap();
    cluster.connect_options("hub_owner")
}

pub(crate) fn record(counter: u32) -> SealedRecord {
    SealedRecord { epoch: 0, counter, sealed: vec![7; 40].into() }
}

async fn try_insert_agent(
    tx: &mut WorkspaceTx,
    agent_id: AgentId,
    credential_id: Option<CredentialId>,
) -> Upserted {
    let presented =
        PresentedBlobs { certificate: vec![1].into(), credential: None, noise_key: vec![2].into() };
    let login = AgentLogin {
        agent_id,
        identity_key: IdentityKey([8; 32]),
        presented: &presented,
        credential_id,
        noise_key_counter: 1,
        static_key: StaticPublicKey([9; 32]),
        wrap_key: &[3],
        address: "192.0.2.0/24",
    };
    tx.insert_agent(&login).await.unwrap()
}

async fn insert_agent(
    tx: &mut WorkspaceTx,
    agent_id: AgentId,
    credential_id: Option<CredentialId>,
) {
    assert_eq!(try_insert_agent(tx, agent_id, credential_id).await, Upserted::Done);
}

/// A row in every table.
pub(crate) async fn populate(store: &Store, workspace: WorkspaceId) {
    let mut tx = store.workspace(workspace).await.unwrap();
    assert!(tx.insert_workspace(b"genesis").await.unwrap());
    let wrap = EpochWrap { epoch: 0, sealed: vec![6].into() };
    let credential = NewCredential {
        id: CREDENTIAL,
        credential: b"credential",
        kind: CredentialKind::Invite,
        uses: 1,
        join_until: 10,
        certs_end: 20,
        open: Some(Opening::Invite { wrap_key: &[3], wrap: &wrap }),
    };
    assert!(tx.insert_credential(&credential).await.unwrap());
    insert_agent(&mut tx, AGENT, Some(CREDENTIAL)).await;
    assert_eq!(tx.expose(AGENT, SERVICE, TAG, &record(1)).await.unwrap(), Exposed::New);
    assert!(tx.expose_to_share(CREDENTIAL, SERVICE, TAG, &record(1)).await.unwrap());
    tx.append_to_log(&[entry(workspace)]).await.unwrap();
    let key = ApiKey::new(workspace.0);
    tx.insert_api_key(AGENT, &key, &[Scope::Read], Duration::from_secs(60)).await.unwrap();
    tx.record(&[now(Event::LogReplaced { base: 1 })]).await.unwrap();
    tx.commit().await.unwrap();
}

/// An entry whose signature nobody looks at here.
pub(crate) fn entry(workspace: WorkspaceId) -> LogEntry {
    let entry = Entry {
        workspace_id: workspace,
        seq: 1,
        prev: EntryHash(workspace.0),
        time: 0,
        changes: vec![Change::Policy(Policy { strict: true })],
        abandons: Vec::new(),
    };
    let signature = (IdentityKey([8; 32]), Signature([9; 64]));
    LogEntry::Entry(Signed::new(entry.encode(), vec![signature]).unwrap())
}

/// All tables that hold rows of workspaces.
pub(crate) async fn tables(connection: &mut PgConnection) -> Vec<String> {
    let rows: Vec<(String,)> = sqlx::query_as(
        "SELECT c.oid::regclass::text FROM pg_class c
         JOIN pg_namespace n ON n.oid = c.relnamespace
         JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = 'workspace_id' AND NOT a.attisdropped
         WHERE n.nspname = 'connect' AND c.relkind IN ('r', 'p') ORDER BY 1",
    )
    .fetch_all(connection)
    .await
    .unwrap();
    rows.into_iter().map(|(name,)| name).collect()
}

/// What [`Store::workspace`] does, for statements of our own.
pub(crate) async fn enter(
    session: &mut PgConnection,
    workspace: WorkspaceId,
) -> sqlx::Transaction<'_, sqlx::Postgres> {
    let mut tx = session.begin().await.unwrap();
    sqlx::query("SELECT set_config('connect.workspace_id', $1, true)")
        .bind(workspace.to_string())
        .execute(&mut *tx)
        .await
        .unwrap();
    tx
}

async fn count(connection: &mut PgConnection, table: &str) -> i64 {
    let sql = sqlx::AssertSqlSafe(format!("SELECT count(*) FROM {table}"));
    sqlx::query_as::<_, (i64,)>(sql).fetch_one(connection).await.unwrap().0
}

#[tokio::test]
async fn a_workspace_sees_its_own_rows_only() {
    with_cluster(|owner, app| async move {
        let store = Store::connect(app.clone()).await.unwrap();
        populate(&store, A).await;
        populate(&store, B).await;
        let mut owner = PgConnection::connect_with(&owner).await.unwrap();
        let tables = tables(&mut owner).await;
        assert!(tables.len() >= 6, "{tables:?}");

        // No WHERE here: row security alone must do it.
        let mut session = PgConnection::connect_with(&app).await.unwrap();
        let mut tx = enter(&mut session, A).await;
        for table in &tables {
            assert_eq!(count(&mut owner, table).await, 2, "{table} in all workspaces");
            assert_eq!(count(&mut tx, table).await, 1, "{table}");
        }
        tx.commit().await.unwrap();

        // A fresh session, and one back in the pool after a transaction: nothing is open.
        let fresh = PgConnection::connect_with(&app).await.unwrap();
        for mut session in [fresh, session] {
            for table in &tables {
                assert_eq!(count(&mut session, table).await, 0, "{table}");
            }
            let written = sqlx::query(
                "INSERT INTO connect.workspaces (workspace_id, genesis, head_hash)
                 VALUES (decode(repeat('cc', 32), 'hex'), '', decode(repeat('cc', 32), 'hex'))",
            )
            .execute(&mut session)
            .await;
            assert!(written.is_err());
            let moved = sqlx::query("UPDATE connect.services SET record_counter = 9")
                .execute(&mut session)
                .await
                .unwrap();
            assert_eq!(moved.rows_affected(), 0);
            let removed =
                sqlx::query("DELETE FROM connect.services").execute(&mut session).await.unwrap();
            assert_eq!(removed.rows_affected(), 0);
        }
    })
    .await;
}

#[tokio::test]
async fn a_row_cannot_point_or_move_into_another_workspace() {
    with_cluster(|_, app| async move {
        let store = Store::connect(app.clone()).await.unwrap();
        populate(&store, A).await;
        populate(&store, B).await;
        let mut tx = store.workspace(A).await.unwrap();
        insert_agent(&mut tx, OTHER_AGENT, None).await;
        tx.commit().await.unwrap();
        // The agent exists in A only.
        let mut tx = store.workspace(B).await.unwrap();
        assert!(
            tx.expose(OTHER_AGENT, ServiceId([9; 16]), LookupTag([9; 16]), &record(1))
                .await
                .is_err()
        );
        let mut session = PgConnection::connect_with(&app).await.unwrap();
        let mut tx = enter(&mut session, B).await;
        let moved = sqlx::query("UPDATE connect.services SET workspace_id = $1")
            .bind(A.0.as_slice())
            .execute(&mut *tx)
            .await;
        assert!(moved.is_err());
    })
    .await;
}

#[tokio::test]
async fn a_role_that_could_see_more_is_refused() {
    with_cluster(|owner_options, app| async move {
        let refused = |options: PgConnectOptions| async move {
            match Store::connect(options).await {
                Err(StoreError::Privileged { why, .. }) => why,
                other => panic!("{other:?}"),
            }
        };
        assert!(refused(owner_options.clone()).await.contains("superuser"));
        let mut owner = PgConnection::connect_with(&owner_options).await.unwrap();
        for (make, unmake, why) in [
            ("ALTER ROLE connect_app BYPASSRLS", "ALTER ROLE connect_app NOBYPASSRLS", "bypasses"),
            (
                "ALTER ROLE connect_app CREATEROLE",
                "ALTER ROLE connect_app NOCREATEROLE",
                "create roles",
            ),
            (
                "GRANT connect_backup TO connect_app",
                "REVOKE connect_backup FROM connect_app",
                "connect_backup",
            ),
            (
                "GRANT pg_read_server_files TO connect_app",
                "REVOKE pg_read_server_files FROM connect_app",
                "the server's files",
            ),
            (
                "GRANT connect_lookup TO connect_app",
                "REVOKE connect_lookup FROM connect_app",
                "owns",
            ),
            (
                "ALTER TABLE connect.agents OWNER TO connect_app",
                "ALTER TABLE connect.agents OWNER TO postgres",
                "owns",
            ),
        ] {
            sqlx::query(make).execute(&mut owner).await.unwrap();
            assert!(refused(app.clone()).await.contains(why), "{make}");
            sqlx::query(unmake).execute(&mut owner).await.unwrap();
        }
        sqlx::query("GRANT ALL ON connect.agents TO connect_app")
            .execute(&mut owner)
            .await
            .unwrap();
        Store::connect(app.clone()).await.unwrap();

        sqlx::query("DELETE FROM connect.schema_history WHERE version = (SELECT max(version) FROM connect.schema_history)")
            .execute(&mut owner)
            .await
            .unwrap();
        assert!(matches!(
            Store::connect(app).await,
            Err(StoreError::Version { found, wanted }) if found < wanted && wanted == latest_version()
        ));
    })
    .await;
}

#[tokio::test]
async fn a_registration_token_is_spent_once_and_in_time() {
    with_cluster(|_, app| async move {
        let store = Store::connect(app.clone()).await.unwrap();
        let mut connection = PgConnection::connect_with(&app).await.unwrap();
        let token = |text: &str| RegistrationToken(text.to_owned());
        create_token(&mut connection, &token("good"), Duration::from_secs(60)).await.unwrap();
        create_token(&mut connection, &token("late"), Duration::ZERO).await.unwrap();
        for (text, commit, spent) in [
            ("good", false, true),
            ("good", true, true),
            ("good", true, false),
            ("late", true, false),
            ("none", true, false),
        ] {
            let mut tx = store.workspace(A).await.unwrap();
            assert_eq!(tx.spend_registration_token(&token(text)).await.unwrap(), spent, "{text}");
            if commit {
                tx.commit().await.unwrap();
            }
        }
        let listed = sqlx::query("SELECT token_hash FROM connect.registration_tokens")
            .fetch_all(&mut connection)
            .await;
        assert!(listed.is_err(), "the hub's role can list tokens");
    })
    .await;
}

#[tokio::test]
async fn a_name_belongs_to_one_agent_and_counters_do_not_fall() {
    with_cluster(|_, app| async move {
        let store = Store::connect(app).await.unwrap();
        populate(&store, A).await;
        let mut tx = store.workspace(A).await.unwrap();
        insert_agent(&mut tx, OTHER_AGENT, None).await;
        tx.commit().await.unwrap();

        let expose = async |agent, service, tag, counter| {
            let mut tx = store.workspace(A).await.unwrap();
            let exposed = tx.expose(agent, service, tag, &record(counter)).await.unwrap();
            if matches!(exposed, Exposed::New | Exposed::Renewed) {
                tx.commit().await.unwrap();
            }
            exposed
        };
        let new = ServiceId([40; 16]);
        assert_eq!(expose(OTHER_AGENT, new, TAG, 1).await, Exposed::TakenBy(AGENT));
        assert_eq!(
            expose(OTHER_AGENT, SERVICE, LookupTag([50; 16]), 9).await,
            Exposed::TakenBy(AGENT)
        );
        assert_eq!(expose(AGENT, SERVICE, TAG, 5).await, Exposed::Renewed);
        assert_eq!(expose(AGENT, SERVICE, TAG, 5).await, Exposed::Renewed);
        assert_eq!(expose(AGENT, SERVICE, TAG, 4).await, Exposed::Stale);
        // The same name with a new id, as after a lost home directory's twin; the old row gives way.
        assert_eq!(expose(AGENT, new, TAG, 1).await, Exposed::New);
        let mut tx = store.workspace(A).await.unwrap();
        assert_eq!(tx.exposer_of(SERVICE).await.unwrap(), None);
        assert_eq!(tx.find_by_tag(TAG).await.unwrap().unwrap().service_id, new);
        assert!(!tx.unexpose(OTHER_AGENT, new).await.unwrap());
        assert!(tx.unexpose(AGENT, new).await.unwrap());
        tx.commit().await.unwrap();
        assert_eq!(expose(OTHER_AGENT, new, TAG, 1).await, Exposed::New);

        let mut tx = store.workspace(A).await.unwrap();
        assert!(tx.publish_agent(AGENT, &record(2)).await.unwrap());
        assert!(!tx.publish_agent(AGENT, &record(1)).await.unwrap());
        let agents = tx.agents(None, 10).await.unwrap();
        assert_eq!(
            agents.iter().map(|agent| agent.agent_id).collect::<Vec<_>>(),
            [AGENT, OTHER_AGENT]
        );
        assert_eq!(agents[0].record, Some(record(2)));
        assert_eq!(agents[0].presented.credential, Some(b"credential".to_vec().into()));
        assert_eq!(tx.agents(Some(AGENT), 10).await.unwrap().len(), 1);
    })
    .await;
}

#[tokio::test]
async fn the_last_use_of_an_invite_has_one_taker() {
    with_cluster(|_, app| async move {
        let store = Store::connect(app).await.unwrap();
        populate(&store, A).await;
        let mut first = store.workspace(A).await.unwrap();
        assert!(first.spend_credential_use(CREDENTIAL).await.unwrap());
        let second = async {
            let mut tx = store.workspace(A).await.unwrap();
            tx.spend_credential_use(CREDENTIAL).await.unwrap()
        };
        // The second waits for the first to decide.
        let (second, ()) = tokio::join!(second, async { first.commit().await.unwrap() });
        assert!(!second);
    })
    .await;
}

#[tokio::test]
async fn a_workspace_cannot_take_every_connection() {
    with_cluster(|_, app| async move {
        let store = Store::connect(app).await.unwrap();
        let mut held = Vec::new();
        for _ in 0..TRANSACTIONS_PER_WORKSPACE {
            held.push(store.workspace(A).await.unwrap());
        }
        // One more waits; meanwhile another workspace is served as if nothing were.
        let crowded = store.workspace(A);
        let beside = async {
            for _ in 0..20 {
                store.workspace(B).await.unwrap().commit().await.unwrap();
            }
            store.snapshot(B).await.unwrap();
        };
        let (crowded, ()) = tokio::join!(crowded, beside);
        assert!(matches!(crowded, Err(StoreError::Crowded)), "{crowded:?}");
        held.pop();
        store.workspace(A).await.unwrap().commit().await.unwrap();
    })
    .await;
}

/// Fills a table by a statement without telling the hub, as years of use would.
async fn fill(owner: &PgConnectOptions, workspace: WorkspaceId, sql: &str, rows: i64) {
    let mut connection = PgConnection::connect_with(owner).await.unwrap();
    let done = sqlx::query(sqlx::AssertSqlSafe(sql.to_owned()))
        .bind(workspace.0.as_slice())
        .bind(rows)
        .execute(&mut connection)
        .await
        .unwrap();
    assert_eq!(done.rows_affected(), u64::try_from(rows).unwrap());
}

/// The number `n` of a kind, as 16 bytes.
fn id(kind: &str) -> String {
    format!("substr(sha256(convert_to('{kind}' || n, 'UTF8')), 1, 16)")
}

/// Inserts agents that never log in.
fn agents() -> String {
    format!(
        "INSERT INTO connect.agents (workspace_id, agent_id, identity_key, certificate, noise_key,
                                     noise_key_counter, static_key, wrap_key, last_address)
         SELECT $1, {}, sha256('x'), '', '', 1, sha256('x'), '', '' FROM generate_series(1, $2) n",
        id("agent")
    )
}

#[tokio::test]
async fn a_full_workspace_takes_no_newcomer() {
    let (_dir, data_dir) = place().await;
    let world = World::start(&data_dir).await;
    let owner = connect_options(&data_dir, "postgres").unwrap();
    fill(&owner, world.workspace.id, &agents(), MAX_AGENTS_PER_WORKSPACE - 2).await;
    let mut newcomer = Control::connect(world.hub.agents).await;
    let refusal = newcomer.try_log_in(&world.workspace.founder(), |_| ()).await;
    assert_eq!(error_code(refusal), ErrorCode::Busy);
    drop(Control::log_in(world.hub.agents, &world.workspace, &world.reacher).await);
    world.hub.stop().await;
}

#[tokio::test]
async fn a_workspace_holds_so_much_and_no_more() {
    with_cluster(|owner, app| async move {
        let store = Store::connect(app).await.unwrap();
        populate(&store, A).await;
        populate(&store, B).await;
        let expose = async |workspace, agent, id: u8| {
            let mut tx = store.workspace(workspace).await.unwrap();
            let (service, tag) = (ServiceId([id; 16]), LookupTag([id; 16]));
            let exposed = tx.expose(agent, service, tag, &record(1)).await.unwrap();
            if matches!(exposed, Exposed::New | Exposed::Renewed) {
                tx.commit().await.unwrap();
            }
            exposed
        };
        let services = |agent: &str, kind: &str| {
            format!(
                "INSERT INTO connect.services (workspace_id, service_id, agent_id, tag, record_epoch, record_counter, record)
                 SELECT $1, {id}, {agent}, {id}, 0, 1, '' FROM generate_series(1, $2) n",
                id = id(kind)
            )
        };
        // One service is there.
        let mine = services("decode(repeat('01', 16), 'hex')", "mine");
        fill(&owner, A, &mine, MAX_SERVICES_PER_AGENT - 2).await;
        assert_eq!(expose(A, AGENT, 7).await, Exposed::New);
        assert_eq!(expose(A, AGENT, 8).await, Exposed::TooMany("this agent"));
        // What is there already is published anew, and another workspace goes on.
        assert_eq!(expose(A, AGENT, 7).await, Exposed::Renewed);
        assert_eq!(expose(B, AGENT, 8).await, Exposed::New);

        // One agent is there, too.
        fill(&owner, A, &agents(), MAX_AGENTS_PER_WORKSPACE - 2).await;
        let theirs = services(&id("agent"), "theirs");
        let room = MAX_SERVICES_PER_WORKSPACE - MAX_SERVICES_PER_AGENT;
        fill(&owner, A, &theirs, room).await;
        let mut tx = store.workspace(A).await.unwrap();
        insert_agent(&mut tx, OTHER_AGENT, None).await;
        tx.commit().await.unwrap();
        assert_eq!(expose(A, OTHER_AGENT, 9).await, Exposed::TooMany("this workspace"));
        let mut tx = store.workspace(A).await.unwrap();
        let one_more = try_insert_agent(&mut tx, AgentId([9; 16]), None).await;
        assert_eq!(one_more, Upserted::TooMany);
    })
    .await;
}

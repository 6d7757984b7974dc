//! Each statement of the store names the workspace: with row security switched off, nothing of another
//! workspace is seen or changed either. Both workspaces have rows with the same ids.

use std::time::Duration;

use connect_hub::store::{
    AgentLogin, AuditBounds, AuditFilter, Exposed, Store, WorkspaceTx, key_id,
};
use connect_spec::{
    audit::{AuditHead, Event},
    control::{AddressedWrap, ApiKey, EpochWrap, PresentedBlobs, Recipient},
    ids::WorkspaceId,
    keys::{IdentityKey, StaticPublicKey},
    objects::Genesis,
    signed::Signed,
    trust::TrustState,
};
use sqlx::{AssertSqlSafe, Connection as _, postgres::PgConnection};

use crate::{
    client,
    isolation::{
        A, AGENT, B, CREDENTIAL, SERVICE, TAG, entry, populate, record, tables, with_cluster,
    },
};

/// A workspace without rows.
const NONE: WorkspaceId = WorkspaceId([0xcc; 32]);

/// Every row of a workspace, as text.
async fn rows(owner: &mut PgConnection, tables: &[String], workspace: WorkspaceId) -> Vec<String> {
    let mut all = Vec::new();
    for table in tables {
        let sql = format!(
            "SELECT t::text FROM {table} t WHERE workspace_id = decode('{workspace}', 'hex') ORDER BY 1"
        );
        let found: Vec<(String,)> =
            sqlx::query_as(AssertSqlSafe(sql)).fetch_all(&mut *owner).await.unwrap();
        all.extend(found.into_iter().map(|(row,)| format!("{table}: {row}")));
    }
    all
}

async fn sees_nothing(tx: &mut WorkspaceTx) {
    assert!(tx.find_workspace().await.unwrap().is_none());
    assert!(tx.find_workspace_at_rest().await.unwrap().is_none());
    assert!(tx.lock_workspace().await.unwrap().is_none());
    assert_eq!(tx.lock_agent(AGENT).await.unwrap(), None);
    assert!(tx.presented_by(&[AGENT]).await.unwrap().is_empty());
    assert!(tx.agents(None, 10).await.unwrap().is_empty());
    assert!(tx.find_credential(CREDENTIAL).await.unwrap().is_none());
    assert!(tx.credentials(None, 10).await.unwrap().is_empty());
    assert!(tx.shares(None, 10).await.unwrap().is_empty());
    assert!(tx.usable_credentials(0).await.unwrap().is_empty());
    assert!(tx.services(None, 10).await.unwrap().is_empty());
    assert!(tx.services_of(AGENT).await.unwrap().is_empty());
    assert_eq!(tx.exposer_of(SERVICE).await.unwrap(), None);
    assert!(tx.find_by_tag(TAG).await.unwrap().is_none());
    assert!(tx.exposing_agents().await.unwrap().is_empty());
    assert!(tx.shared_services(CREDENTIAL, None).await.unwrap().is_empty());
    assert!(tx.shared_services(CREDENTIAL, Some(TAG)).await.unwrap().is_empty());
    assert!(tx.agents_without_wrap(1, None, 10).await.unwrap().is_empty());
    assert!(tx.invites_without_wrap(1, 0, None, 10).await.unwrap().is_empty());
    assert!(tx.agent_wrap(AGENT, 0).await.unwrap().is_none());
    assert!(tx.newest_credential_wrap(CREDENTIAL).await.unwrap().is_none());
    assert!(tx.find_in_log(&[entry(A).head()]).await.unwrap().is_none());
    assert!(tx.log_hashes(0, 10).await.unwrap().is_empty());
    assert!(tx.log_part(0, 1000).await.unwrap().is_empty());
    assert!(tx.replaced_trust().await.is_err(), "there is no such workspace");
    let AuditBounds { base, head } = tx.audit_bounds().await.unwrap();
    assert_eq!((base, head), (AuditHead::EMPTY, AuditHead::EMPTY));
    assert!(tx.audit_rows(&AuditFilter::default(), 10).await.unwrap().is_empty());
    assert!(tx.api_keys(Duration::ZERO).await.unwrap().is_empty());
    assert_eq!(tx.count_api_keys().await.unwrap(), 0);
    assert_eq!(tx.use_api_key(&ApiKey::new(A.0)).await.unwrap(), None);
}

async fn sees_its_own(tx: &mut WorkspaceTx) {
    assert_eq!(tx.presented_by(&[AGENT]).await.unwrap().len(), 1);
    assert_eq!(tx.agents(None, 10).await.unwrap().len(), 1);
    assert_eq!(tx.agents_without_wrap(1, None, 10).await.unwrap().len(), 1);
    assert_eq!(tx.invites_without_wrap(1, 0, None, 10).await.unwrap().len(), 1);
    assert_eq!(tx.credentials(None, 10).await.unwrap().len(), 1);
    assert_eq!(tx.usable_credentials(0).await.unwrap().len(), 1);
    assert_eq!(tx.services(None, 10).await.unwrap().len(), 1);
    assert_eq!(tx.exposing_agents().await.unwrap().len(), 1);
    assert_eq!(tx.shared_services(CREDENTIAL, Some(TAG)).await.unwrap().len(), 1);
    assert_eq!(tx.log_part(0, 1000).await.unwrap().len(), 1);
    assert_eq!(tx.audit_rows(&AuditFilter::default(), 10).await.unwrap().len(), 1);
    assert_eq!(tx.api_keys(Duration::ZERO).await.unwrap().len(), 1);
    assert_eq!(tx.count_api_keys().await.unwrap(), 1);
}

/// Every statement that changes something, with ids that both workspaces have.
async fn change_all(tx: &mut WorkspaceTx) {
    let workspace = tx.workspace_id();
    let presented =
        PresentedBlobs { certificate: vec![4].into(), credential: None, noise_key: vec![5].into() };
    let login = AgentLogin {
        agent_id: AGENT,
        identity_key: IdentityKey([8; 32]),
        presented: &presented,
        credential_id: Some(CREDENTIAL),
        noise_key_counter: 2,
        static_key: StaticPublicKey([1; 32]),
        wrap_key: &[4],
        address: "198.51.100.0/24",
    };
    tx.update_agent(&login).await.unwrap();
    tx.leave_renewal(AGENT, &[1]).await.unwrap();
    assert!(tx.publish_agent(AGENT, &record(7)).await.unwrap());
    assert!(tx.spend_credential_use(CREDENTIAL).await.unwrap());
    for recipient in [Recipient::Agent(AGENT), Recipient::Credential(CREDENTIAL)] {
        for epoch in [0, 1] {
            let wrap = EpochWrap { epoch, sealed: vec![9].into() };
            assert!(tx.store_wrap(&AddressedWrap { recipient, wrap }).await.unwrap());
        }
    }
    tx.forget_wraps_below(1).await.unwrap();
    assert_eq!(tx.expose(AGENT, SERVICE, TAG, &record(5)).await.unwrap(), Exposed::Renewed);
    assert!(tx.expose_to_share(CREDENTIAL, SERVICE, TAG, &record(5)).await.unwrap());
    assert!(tx.unexpose(AGENT, SERVICE).await.unwrap());
    assert_eq!(tx.expose(AGENT, SERVICE, TAG, &record(6)).await.unwrap(), Exposed::New);
    tx.withdraw_name(AGENT, TAG).await.unwrap();
    assert_eq!(tx.expose(AGENT, SERVICE, TAG, &record(7)).await.unwrap(), Exposed::New);
    tx.withdraw_services_of(&[AGENT]).await.unwrap();
    let founded = client::Workspace::new();
    let genesis: Signed<Genesis> = Signed::decode(&founded.create(None).genesis.0).unwrap();
    let state = TrustState::from_genesis(founded.id, &genesis).unwrap();
    tx.replace_in_log(0, &[entry(workspace)], &state).await.unwrap();
    assert!(!tx.revoke_api_key(key_id(&ApiKey::new(A.0))).await.unwrap());
    assert!(tx.use_api_key(&ApiKey::new(workspace.0)).await.unwrap().is_some());
    assert!(tx.revoke_api_key(key_id(&ApiKey::new(workspace.0))).await.unwrap());
    tx.record(&[connect_hub::audit::now(Event::LogReplaced { base: 2 })]).await.unwrap();
}

#[tokio::test]
async fn without_row_security_the_statements_keep_workspaces_apart() {
    with_cluster(|owner, app| async move {
        let store = Store::connect(app).await.unwrap();
        let mut owner = PgConnection::connect_with(&owner).await.unwrap();
        let tables = tables(&mut owner).await;
        for table in &tables {
            let sql = format!("ALTER TABLE {table} DISABLE ROW LEVEL SECURITY");
            sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut owner).await.unwrap();
        }
        populate(&store, A).await;
        populate(&store, B).await;

        let mut tx = store.workspace(NONE).await.unwrap();
        sees_nothing(&mut tx).await;
        drop(tx);
        for workspace in [A, B] {
            let mut tx = store.workspace(workspace).await.unwrap();
            sees_its_own(&mut tx).await;
        }

        let before = rows(&mut owner, &tables, A).await;
        assert!(before.len() >= tables.len(), "{before:?}");
        let own = rows(&mut owner, &tables, B).await;
        let mut tx = store.workspace(B).await.unwrap();
        change_all(&mut tx).await;
        tx.commit().await.unwrap();
        assert_eq!(rows(&mut owner, &tables, A).await, before);
        assert_ne!(rows(&mut owner, &tables, B).await, own);
    })
    .await;
}

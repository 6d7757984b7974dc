//! What a logged-in agent asks of the store, and the answers.

use connect_spec::{
    bytes::Blob,
    control::{EpochWrap, ErrorCode, ErrorReport, Reply, Request, SealedRecord},
    ids::{AgentId, ServiceId},
    keys::WrapPublicKey,
    limits::MAX_CONTROL_BYTES,
    objects::{AgentRole, Credential},
    signed::Signed,
    trust::TrustState,
};
use serde::Serialize;

use crate::{
    hub::Hub,
    limits::{MAX_SEALED_BYTES, MAX_WRAP_BYTES, PAGE_ROWS},
    router::Member,
    store::{Exposed, NewCredential, StoreError},
};

/// Room in a page for what is around its rows.
const PAGE_FRAME_BYTES: usize = 256;

/// Why a request came to nothing.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{}", .0.message)]
    Report(ErrorReport),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A refusal that the agent is told.
fn no<T>(code: ErrorCode, message: &str) -> Result<T, Failure> {
    Err(Failure::Report(ErrorReport::new(code, message)))
}

/// What the agent hears when the store failed; the log says why.
pub fn store_trouble(error: &StoreError) -> ErrorReport {
    match error {
        StoreError::Database(_) => {
            tracing::error!(error = %chain(error), "the database does not answer as it should");
            ErrorReport::new(ErrorCode::Busy, "the hub's database is not available, try again")
        }
        StoreError::Migrate(_)
        | StoreError::Corrupt(_)
        | StoreError::Privileged { .. }
        | StoreError::Version { .. } => {
            tracing::error!(error = %chain(error), "the store failed");
            ErrorReport::new(ErrorCode::Internal, "the hub failed; its log says why")
        }
    }
}

/// An error with its causes, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// Does what is asked; never fails, but may say no.
pub async fn answer(hub: &Hub, member: &Member, request: Request) -> Reply {
    match try_answer(hub, member, request).await {
        Ok(reply) => reply,
        Err(Failure::Report(report)) => Reply::Error(report),
        Err(Failure::Store(error)) => Reply::Error(store_trouble(&error)),
    }
}

/// Says why a service that no agent online exposes cannot be reached.
pub async fn why_not_online(
    hub: &Hub,
    member: &Member,
    service: ServiceId,
    responder: AgentId,
) -> Reply {
    let find = async {
        let mut tx = hub.store().workspace(member.key.0).await?;
        tx.exposer_of(service).await
    };
    Reply::Error(match find.await {
        Ok(Some(exposer)) if exposer == responder => {
            ErrorReport::new(ErrorCode::Offline, "the agent that exposes the service is offline")
        }
        Ok(_) => ErrorReport::new(ErrorCode::NotFound, "no such service"),
        Err(error) => store_trouble(&error),
    })
}

async fn try_answer(hub: &Hub, member: &Member, request: Request) -> Result<Reply, Failure> {
    let (workspace, agent) = member.key;
    match request {
        Request::CreateCredential { credential, wrap_key, wrap } => {
            create_credential(hub, member, &credential, &wrap_key, &wrap).await?;
            Ok(Reply::Done)
        }
        Request::PublishAgent { record } => {
            check_sealed(&record)?;
            let mut tx = hub.store().workspace(workspace).await?;
            if !tx.publish_agent(agent, &record).await? {
                return no(ErrorCode::Stale, "the hub holds a newer record of this agent");
            }
            tx.commit().await?;
            Ok(Reply::Done)
        }
        Request::Expose { service_id, tag, record, take_over } => {
            if !member.role.may_expose() {
                return no(
                    ErrorCode::Forbidden,
                    "the role of this agent does not let it expose services",
                );
            }
            check_sealed(&record)?;
            let mut tx = hub.store().workspace(workspace).await?;
            let mut exposed = tx.expose(agent, service_id, tag, &record).await?;
            if let Exposed::TakenBy(holder) = exposed
                && take_over
                && !hub.route(|router, _| router.is_online(&(workspace, holder)))
            {
                tx.withdraw_name(holder, tag).await?;
                exposed = tx.expose(agent, service_id, tag, &record).await?;
            }
            match exposed {
                Exposed::Done => {}
                Exposed::Stale => {
                    return no(ErrorCode::Stale, "the hub holds a newer record of this service");
                }
                Exposed::TakenBy(holder) => {
                    let mut report = ErrorReport::new(
                        ErrorCode::NameTaken,
                        "another agent exposes a service of this name",
                    );
                    report.agent_id = Some(holder);
                    return Err(Failure::Report(report));
                }
            }
            tx.commit().await?;
            hub.route(|router, _| router.handle_expose(&member.key, service_id));
            Ok(Reply::Done)
        }
        Request::Unexpose { service_id } => {
            let mut tx = hub.store().workspace(workspace).await?;
            let found = tx.unexpose(agent, service_id).await?;
            tx.commit().await?;
            hub.route(|router, _| router.handle_unexpose(&member.key, service_id));
            if found {
                Ok(Reply::Done)
            } else {
                no(ErrorCode::NotFound, "this agent exposes no such service")
            }
        }
        Request::Lookup { tag } => {
            let mut tx = hub.store().workspace(workspace).await?;
            let mut services: Vec<_> = tx
                .find_by_tag(tag)
                .await?
                .into_iter()
                .filter(|service| member.sees(service.service_id))
                .collect();
            hub.route(|router, _| {
                for service in &mut services {
                    service.online = router.is_online(&(workspace, service.agent_id));
                }
            });
            Ok(Reply::Services { services, more: false })
        }
        Request::Services { after } => {
            let mut page = Page::new();
            let mut last = after;
            let mut tx = hub.store().workspace(workspace).await?;
            loop {
                let mut rows = tx.services(last, PAGE_ROWS).await?;
                let is_last = i64::try_from(rows.len()).is_ok_and(|rows| rows < PAGE_ROWS);
                last = rows.last().map(|row| row.service_id).or(last);
                rows.retain(|row| member.sees(row.service_id));
                hub.route(|router, _| {
                    for row in &mut rows {
                        row.online = router.is_online(&(workspace, row.agent_id));
                    }
                });
                let full = page.fill(rows);
                if is_last || full {
                    return Ok(Reply::Services { services: page.rows, more: full });
                }
            }
        }
        Request::Agents { after } => {
            if member.role == AgentRole::Guest {
                return no(ErrorCode::Forbidden, "guests do not see the agents of a workspace");
            }
            let mut page = Page::new();
            let mut last = after;
            let mut tx = hub.store().workspace(workspace).await?;
            loop {
                let mut rows = tx.agents(last, PAGE_ROWS).await?;
                let is_last = i64::try_from(rows.len()).is_ok_and(|rows| rows < PAGE_ROWS);
                last = rows.last().map(|row| row.agent_id).or(last);
                hub.route(|router, _| {
                    for row in &mut rows {
                        row.online = router.is_online(&(workspace, row.agent_id));
                    }
                });
                let full = page.fill(rows);
                if is_last || full {
                    return Ok(Reply::Agents { agents: page.rows, more: full });
                }
            }
        }
        // A session opens tunnels itself: that needs no store and must not wait for it.
        Request::Log { .. }
        | Request::Append { .. }
        | Request::Beats { .. }
        | Request::MissingWraps { .. }
        | Request::StoreWraps { .. }
        | Request::OwnWrap { .. }
        | Request::Credentials { .. }
        | Request::Certify { .. } => no(ErrorCode::BadRequest, "not supported yet"),
        Request::OpenTunnel(_) => no(ErrorCode::BadRequest, "tunnels are opened in the session"),
    }
}

fn check_sealed(record: &SealedRecord) -> Result<(), Failure> {
    if record.sealed.0.len() > MAX_SEALED_BYTES {
        return no(ErrorCode::BadRequest, "the sealed record is too long");
    }
    Ok(())
}

/// Stores a credential that a signer of the workspace signed; who brings it does not matter.
async fn create_credential(
    hub: &Hub,
    member: &Member,
    wire: &Blob,
    wrap_key: &Blob,
    wrap: &EpochWrap,
) -> Result<(), Failure> {
    let Ok(credential) = Signed::<Credential>::decode(&wire.0) else {
        return no(ErrorCode::BadRequest, "the credential is malformed");
    };
    let object = credential.object();
    let (Ok(join_until), Ok(certs_end)) =
        (i64::try_from(object.join_until), i64::try_from(object.certs_end))
    else {
        return no(ErrorCode::BadRequest, "a time of the credential is out of range");
    };
    if WrapPublicKey::decode(&wrap_key.0).is_none_or(|key| key.hash() != object.wrap_key_hash) {
        return no(ErrorCode::BadRequest, "the wrap key is not the one that the credential binds");
    }
    if wrap.sealed.0.len() > MAX_WRAP_BYTES {
        return no(ErrorCode::BadRequest, "the wrap is too long");
    }
    let mut tx = hub.store().workspace(member.key.0).await?;
    let Some(workspace) = tx.find_workspace().await? else {
        return no(ErrorCode::UnknownWorkspace, "this hub does not know the workspace");
    };
    let genesis = Signed::decode(&workspace.genesis).map_err(|_| StoreError::Corrupt("genesis"))?;
    let trust = TrustState::from_genesis(member.key.0, &genesis)
        .map_err(|_| StoreError::Corrupt("genesis"))?;
    if trust.verify_credential(&credential).is_err() {
        return no(
            ErrorCode::Forbidden,
            "the credential is not signed by a signer of the workspace",
        );
    }
    let new = NewCredential {
        id: object.id(),
        credential: &wire.0,
        kind: object.kind,
        uses: object.uses,
        join_until,
        certs_end,
        wrap_key: &wrap_key.0,
        wrap,
    };
    if !tx.insert_credential(&new).await? {
        return no(ErrorCode::AlreadyExists, "a credential of this key exists");
    }
    tx.commit().await?;
    Ok(())
}

/// Rows that fit one control message.
struct Page<T> {
    rows: Vec<T>,
    bytes: usize,
}

impl<T: Serialize> Page<T> {
    fn new() -> Self {
        Self { rows: Vec::new(), bytes: PAGE_FRAME_BYTES }
    }

    /// Takes rows until one does not fit; true when one did not.
    fn fill(&mut self, rows: Vec<T>) -> bool {
        for row in rows {
            let length =
                serde_json::to_string(&row).map_or(MAX_CONTROL_BYTES, |text| text.len() + 1);
            if self.bytes + length > MAX_CONTROL_BYTES {
                return true;
            }
            self.bytes += length;
            self.rows.push(row);
        }
        false
    }
}

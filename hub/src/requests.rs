//! What a logged-in agent asks of the store, and the answers.

use std::{
    collections::{BTreeSet, HashMap},
    time::Duration,
};

use connect_spec::{
    audit::Event,
    bytes::Blob,
    control::{
        EpochWrap, ErrorCode, ErrorReport, FromHub, ListedBeat, Reply, Request, SealedRecord,
    },
    ids::{AgentId, CredentialId, LookupTag, ServiceId},
    keys::WrapPublicKey,
    limits::MAX_CONTROL_BYTES,
    log::Beat,
    objects::{AgentRole, Certificate, Credential, CredentialKind, Issuer, UnixTime},
    signed::Signed,
    trust::{Presented, TrustError},
};
use serde::Serialize;

use crate::{
    api_keys, audit,
    auth::unix_now,
    hub::Hub,
    limits::{BUSY_RETRY, MAX_OPEN_CREDENTIALS, MAX_SEALED_BYTES, MAX_WRAP_BYTES, PAGE_ROWS},
    log,
    router::{Member, Parties},
    store::{Exposed, NewCredential, Opening, StoreError, WorkspaceTx},
    wraps,
};

/// Room in a page for what is around its rows.
const PAGE_FRAME_BYTES: usize = 256;

/// Why a request came to nothing.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// The agent is told this.
    #[error("{}", .0.message)]
    Report(ErrorReport),
    /// Our own trouble; the agent learns only that.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A refusal that the agent is told.
pub(crate) fn no<T>(code: ErrorCode, message: &str) -> Result<T, Failure> {
    Err(Failure::Report(ErrorReport::new(code, message)))
}

/// The refusal of whatever is about a workspace that is not here.
pub(crate) fn unknown_workspace<T>() -> Result<T, Failure> {
    no(ErrorCode::UnknownWorkspace, "this hub does not know the workspace")
}

/// What the agent hears when the store failed; the log says why.
pub fn store_trouble(error: &StoreError) -> ErrorReport {
    match error {
        StoreError::Database(_) | StoreError::Connect { .. } => {
            tracing::error!(error = %chain(error), "the database does not answer as it should");
            busy("the hub's database is not available, try again")
        }
        StoreError::Away => busy("the hub's database is away, try again"),
        StoreError::Crowded => busy("too much is going on in this workspace, try again"),
        StoreError::Migrate(_)
        | StoreError::Corrupt(_)
        | StoreError::Privileged { .. }
        | StoreError::Version { .. } => {
            tracing::error!(error = %chain(error), "the store failed");
            ErrorReport::new(ErrorCode::Internal, "the hub failed; its log says why")
        }
    }
}

/// A refusal for want of what is soon free again.
pub(crate) fn busy(message: &str) -> ErrorReport {
    ErrorReport::new(ErrorCode::Busy, message).retry_in(BUSY_RETRY)
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
    reply(try_answer(hub, member, request).await)
}

/// Makes a reply of what came of a request.
pub(crate) fn reply(result: Result<Reply, Failure>) -> Reply {
    match result {
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
    let report = match find.await {
        Ok(Some(exposer)) if exposer == responder => {
            ErrorReport::new(ErrorCode::Offline, "the agent that exposes the service is offline")
        }
        Ok(_) => ErrorReport::new(ErrorCode::NotFound, "no such service"),
        Err(error) => store_trouble(&error),
    };
    let parties = Parties { reacher: member.key.1, exposer: responder, service, share: None };
    hub.note(member.key.0, parties.refused(report.code));
    Reply::Error(report)
}

async fn try_answer(hub: &Hub, member: &Member, request: Request) -> Result<Reply, Failure> {
    let (workspace, agent) = member.key;
    match request {
        Request::CreateCredential { credential, wrap_key, wrap } => {
            create_invite(hub, member, &credential, &wrap_key, &wrap).await?;
            Ok(Reply::Done)
        }
        Request::CreateShare { credential, record } => {
            create_share(hub, member, &credential, &record).await?;
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
            let mut events = Vec::new();
            let mut exposed = tx.expose(agent, service_id, tag, &record).await?;
            if let Exposed::TakenBy(holder) = exposed
                && take_over
                && !hub.route(|router, _| router.is_online(&(workspace, holder)))
            {
                tx.withdraw_name(holder, tag).await?;
                exposed = tx.expose(agent, service_id, tag, &record).await?;
                let taken = Event::NameTaken { agent_id: agent, peer_id: holder, service_id };
                events.push(audit::now(taken));
            }
            match exposed {
                Exposed::New => {
                    events.push(audit::now(Event::ServiceExposed { agent_id: agent, service_id }));
                }
                Exposed::Renewed => {}
                Exposed::TooMany(whose) => {
                    let message =
                        format!("{whose} exposes as many services as this hub keeps for it");
                    return no(ErrorCode::Busy, &message);
                }
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
            tx.record(&events).await?;
            tx.commit().await?;
            hub.route(|router, _| router.handle_expose(&member.key, service_id));
            Ok(Reply::Done)
        }
        Request::ExposeToShare { share_id, service_id, tag, record } => {
            expose_to_share(hub, member, share_id, service_id, tag, &record).await?;
            Ok(Reply::Done)
        }
        Request::Unexpose { service_id } => {
            let mut tx = hub.store().workspace(workspace).await?;
            let found = tx.unexpose(agent, service_id).await?;
            if found {
                let event = Event::ServiceUnexposed { agent_id: agent, service_id };
                tx.record(&[audit::now(event)]).await?;
            }
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
            let mut services = match &member.share {
                Some((share, _)) => tx.shared_services(*share, Some(tag)).await?,
                None => tx.find_by_tag(tag).await?.into_iter().collect(),
            };
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
                let mut rows = match &member.share {
                    Some((share, _)) => {
                        let mut rows = tx.shared_services(*share, None).await?;
                        rows.retain(|row| Some(row.service_id) > last);
                        rows
                    }
                    None => tx.services(last, PAGE_ROWS).await?,
                };
                let is_last = i64::try_from(rows.len()).is_ok_and(|rows| rows < PAGE_ROWS);
                last = rows.last().map(|row| row.service_id).or(last);
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
        Request::Log { have } => log::read(hub, workspace, &have).await,
        Request::Append { entries } => {
            log::append(hub, workspace, &entries).await?;
            Ok(Reply::Done)
        }
        Request::Beats { mine } => {
            let mine = mine.map(|wire| check_beat(member, wire)).transpose()?;
            let beats = hub.exchange_beats(member.key, mine);
            let witnesses: Vec<_> = beats.iter().map(|(witness, _)| *witness).collect();
            let mut tx = hub.store().workspace(workspace).await?;
            let mut presented: HashMap<_, _> =
                tx.presented_by(&witnesses).await?.into_iter().collect();
            let beats = beats.into_iter().filter_map(|(witness, beat)| {
                Some(ListedBeat { beat, presented: presented.remove(&witness)? })
            });
            let beats = beats.collect();
            let is_guest = member.role == AgentRole::Guest;
            let audit = if is_guest { None } else { Some(tx.audit_bounds().await?.head) };
            Ok(Reply::Beats { beats, audit })
        }
        Request::MissingWraps { epoch } => wraps::missing(hub, member, epoch).await,
        Request::StoreWraps { wraps } => {
            wraps::store(hub, member, wraps).await?;
            Ok(Reply::Done)
        }
        Request::OwnWrap { epoch } => wraps::own(hub, member, epoch).await,
        Request::Credentials { after } => credentials(hub, member, after, Listed::All).await,
        Request::Shares { after } => credentials(hub, member, after, Listed::Shares).await,
        Request::Certify { certificate } => {
            certify(hub, member, &certificate).await?;
            Ok(Reply::Done)
        }
        Request::Audit { after, since } => audit::read(hub, member, after, since).await,
        Request::CreateApiKey { scopes, valid_for } => {
            api_keys::create(hub, member, &scopes, Duration::from_secs(valid_for)).await
        }
        Request::ApiKeys => api_keys::list(hub, member).await,
        Request::RevokeApiKey { key_id } => {
            api_keys::revoke(hub, member, key_id).await?;
            Ok(Reply::Done)
        }
        // A session opens tunnels itself: that needs no store and must not wait for it.
        Request::OpenTunnel(_) => no(ErrorCode::BadRequest, "tunnels are opened in the session"),
    }
}

fn check_sealed(record: &SealedRecord) -> Result<(), Failure> {
    if record.sealed.0.len() > MAX_SEALED_BYTES {
        return no(ErrorCode::BadRequest, "the sealed record is too long");
    }
    Ok(())
}

/// Stores an invite that a signer of the workspace signed; who brings it does not matter.
async fn create_invite(
    hub: &Hub,
    member: &Member,
    wire: &Blob,
    wrap_key: &Blob,
    wrap: &EpochWrap,
) -> Result<(), Failure> {
    let credential = check_credential(wire, CredentialKind::Invite)?;
    let object = credential.object();
    if WrapPublicKey::decode(&wrap_key.0).is_none_or(|key| key.hash() != object.wrap_key_hash) {
        return no(ErrorCode::BadRequest, "the wrap key is not the one that the credential binds");
    }
    if wrap.sealed.0.len() > MAX_WRAP_BYTES {
        return no(ErrorCode::BadRequest, "the wrap is too long");
    }
    let created = Event::InviteCreated {
        agent_id: member.key.1,
        credential_id: object.id(),
        uses: object.uses,
        join_until: object.join_until,
    };
    let opening = Opening::Invite { wrap_key: &wrap_key.0, wrap };
    let tx = store_credential(hub, member, wire, &credential, opening, created).await?;
    tx.commit().await?;
    Ok(())
}

/// Stores a share that a signer of the workspace signed, and tells those whose services it names.
async fn create_share(
    hub: &Hub,
    member: &Member,
    wire: &Blob,
    record: &Blob,
) -> Result<(), Failure> {
    let credential = check_credential(wire, CredentialKind::Share)?;
    if record.0.len() > MAX_SEALED_BYTES {
        return no(ErrorCode::BadRequest, "the sealed record is too long");
    }
    let object = credential.object();
    let (workspace, share_id) = (member.key.0, object.id());
    let service_ids = object.services.clone().unwrap_or_default();
    let created = Event::ShareCreated {
        agent_id: member.key.1,
        credential_id: share_id,
        service_ids: service_ids.clone(),
        certs_end: object.certs_end,
    };
    let opening = Opening::Share { record: &record.0 };
    let mut tx = store_credential(hub, member, wire, &credential, opening, created).await?;
    let mut exposers = BTreeSet::new();
    for service in service_ids {
        exposers.extend(tx.exposer_of(service).await?);
    }
    tx.commit().await?;
    hub.route(|router, out| {
        for exposer in &exposers {
            router.tell(workspace, *exposer, &FromHub::ShareMade { share_id }, out);
        }
    });
    Ok(())
}

/// Reads the credential of a kind.
fn check_credential(wire: &Blob, kind: CredentialKind) -> Result<Signed<Credential>, Failure> {
    match Signed::<Credential>::decode(&wire.0) {
        Ok(credential) if credential.object().kind == kind => Ok(credential),
        Ok(_) => no(ErrorCode::BadRequest, "the credential is of another kind"),
        Err(_) => no(ErrorCode::BadRequest, "the credential is malformed"),
    }
}

/// Stores a credential and records that it was; the transaction is the caller's to commit.
async fn store_credential(
    hub: &Hub,
    member: &Member,
    wire: &Blob,
    credential: &Signed<Credential>,
    opening: Opening<'_>,
    created: Event,
) -> Result<WorkspaceTx, Failure> {
    let object = credential.object();
    let (Ok(join_until), Ok(certs_end)) =
        (i64::try_from(object.join_until), i64::try_from(object.certs_end))
    else {
        return no(ErrorCode::BadRequest, "a time of the credential is out of range");
    };
    let mut tx = hub.store().workspace(member.key.0).await?;
    let Some(trust) = hub.trust().current(&mut tx).await? else {
        return unknown_workspace();
    };
    if trust.state.is_closed(&object.id()) {
        return no(ErrorCode::Forbidden, "the credential is closed");
    }
    if trust.state.verify_credential(credential).is_err() {
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
        open: Some(opening),
    };
    if !tx.insert_credential(&new).await? {
        return no(ErrorCode::AlreadyExists, "a credential of this key exists");
    }
    let now = i64::try_from(unix_now()).unwrap_or(i64::MAX);
    let usable = tx.usable_credentials(now).await?;
    if usable.iter().filter(|id| !trust.state.is_closed(id)).count() > MAX_OPEN_CREDENTIALS {
        return no(
            ErrorCode::Busy,
            "too many invites of this workspace are open: close some, or wait until they expire",
        );
    }
    tx.record(&[audit::now(created)]).await?;
    Ok(tx)
}

/// Stores a service for the guests of a share that names it.
async fn expose_to_share(
    hub: &Hub,
    member: &Member,
    share: CredentialId,
    service: ServiceId,
    tag: LookupTag,
    record: &SealedRecord,
) -> Result<(), Failure> {
    check_sealed(record)?;
    let mut tx = hub.store().workspace(member.key.0).await?;
    let Some(trust) = hub.trust().current(&mut tx).await? else {
        return unknown_workspace();
    };
    let known = tx.find_credential(share).await?;
    let credential = known.map(|row| Signed::<Credential>::decode(&row.credential)).transpose();
    let credential = credential.map_err(|_| StoreError::Corrupt("credential"))?;
    let names = |credential: &Signed<Credential>| {
        let services = credential.object().services.as_deref().unwrap_or_default();
        services.contains(&service) && trust.state.verify_credential(credential).is_ok()
    };
    if !credential.as_ref().is_some_and(names) || trust.state.is_closed(&share) {
        return no(ErrorCode::NotFound, "no share that is open names the service");
    }
    if tx.exposer_of(service).await? != Some(member.key.1) {
        return no(ErrorCode::NotFound, "this agent exposes no such service");
    }
    if !tx.expose_to_share(share, service, tag, record).await? {
        return no(ErrorCode::Stale, "the hub holds a newer record of this service");
    }
    tx.commit().await?;
    Ok(())
}

/// Which credentials are listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Listed {
    All,
    Shares,
}

/// Lists the credentials that are not closed.
async fn credentials(
    hub: &Hub,
    member: &Member,
    after: Option<CredentialId>,
    listed: Listed,
) -> Result<Reply, Failure> {
    if member.role == AgentRole::Guest {
        return no(ErrorCode::Forbidden, "guests do not see the invites of a workspace");
    }
    let mut tx = hub.store().workspace(member.key.0).await?;
    let Some(trust) = hub.trust().current(&mut tx).await? else {
        return unknown_workspace();
    };
    let mut page = Page::new();
    let mut last = after;
    loop {
        let rows = match listed {
            Listed::All => tx.credentials(last, PAGE_ROWS).await?,
            Listed::Shares => tx.shares(last, PAGE_ROWS).await?,
        };
        let is_last = i64::try_from(rows.len()).is_ok_and(|rows| rows < PAGE_ROWS);
        last = rows.last().map(|(id, _)| *id).or(last);
        let open = rows.into_iter().filter(|(id, _)| !trust.state.is_closed(id));
        let full = page.fill(open.map(|(_, row)| row).collect());
        if is_last || full {
            return Ok(Reply::Credentials { credentials: page.rows, more: full });
        }
    }
}

/// A beat must be the word of the agent that leaves it.
fn check_beat(member: &Member, wire: Blob) -> Result<(UnixTime, Blob), Failure> {
    if member.role == AgentRole::Guest {
        return no(ErrorCode::Forbidden, "guests are no witnesses");
    }
    let Ok(beat) = Signed::<Beat>::decode(&wire.0) else {
        return no(ErrorCode::BadRequest, "the beat is malformed");
    };
    if (beat.object().workspace_id, beat.object().agent_id) != member.key
        || beat.verify_by(&member.identity).is_err()
    {
        return no(ErrorCode::Forbidden, "the beat is not this agent's own");
    }
    Ok((beat.object().time, wire))
}

/// Leaves a certificate for an agent, verified down to the signer; who brings it does not matter.
async fn certify(hub: &Hub, member: &Member, wire: &Blob) -> Result<(), Failure> {
    let Ok(certificate) = Signed::<Certificate>::decode(&wire.0) else {
        return no(ErrorCode::BadRequest, "the certificate is malformed");
    };
    if member.role == AgentRole::Guest
        || matches!(certificate.object().issuer, Issuer::Credential(_))
    {
        return no(ErrorCode::Forbidden, "only signers give certificates to others");
    }
    let (workspace, agent) = (member.key.0, certificate.object().agent_id());
    let mut tx = hub.store().workspace(workspace).await?;
    let Some(trust) = hub.trust().current(&mut tx).await? else {
        return unknown_workspace();
    };
    let Some(known) = tx.lock_agent(agent).await? else {
        return no(ErrorCode::NotFound, "this hub knows no such agent");
    };
    if known.renewal.as_ref() == Some(&wire.0) {
        return Ok(());
    }
    for held in [Some(&known.certificate), known.renewal.as_ref()].into_iter().flatten() {
        let held: Signed<Certificate> =
            Signed::decode(held).map_err(|_| StoreError::Corrupt("certificate"))?;
        if certificate.object().serial <= held.object().serial {
            return no(ErrorCode::Stale, "the hub knows a newer certificate of this agent");
        }
    }
    let noise_key =
        Signed::decode(&known.noise_key).map_err(|_| StoreError::Corrupt("noise_key"))?;
    let serial = certificate.object().serial;
    let presented = Presented { certificate, credential: None, noise_key };
    if let Err(error) = trust.state.verify_peer(agent, presented, unix_now()) {
        let revoked = error == TrustError::Revoked;
        let code = if revoked { ErrorCode::Revoked } else { ErrorCode::Forbidden };
        return no(code, &error.to_string());
    }
    tx.leave_renewal(agent, &wire.0).await?;
    let issued = Event::CertificateIssued { agent_id: member.key.1, peer_id: agent, serial };
    tx.record(&[audit::now(issued)]).await?;
    tx.commit().await?;
    // Whoever brings its own has it, and comes back with it when it likes.
    if agent != member.key.1 {
        hub.route(|router, out| router.handle_recall((workspace, agent), out));
    }
    Ok(())
}

/// Rows that fit one control message.
pub(crate) struct Page<T> {
    /// The rows so far.
    pub(crate) rows: Vec<T>,
    bytes: usize,
}

impl<T: Serialize> Page<T> {
    pub(crate) fn new() -> Self {
        Self { rows: Vec::new(), bytes: PAGE_FRAME_BYTES }
    }

    /// A page for what follows in the same message.
    pub(crate) fn rest<U>(&self) -> Page<U> {
        Page { rows: Vec::new(), bytes: self.bytes }
    }

    /// Takes rows until one does not fit; true when one did not.
    pub(crate) fn fill(&mut self, rows: Vec<T>) -> bool {
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

//! How an agent proves who it is, and how the hub takes it in.
//!
//! The proof is a signature over this hub's name, this connection's nonce and the workspace; what it
//! shows of itself is verified down to the genesis that the workspace id names. All this is a
//! second lock: the peers verify each other again, inside the handshake.

use std::{
    collections::{BTreeSet, HashSet},
    net::IpAddr,
    time::{SystemTime, UNIX_EPOCH},
};

use connect_spec::{
    audit::{Event, Recorded},
    bytes::Blob,
    control::{
        CreateWorkspace, ErrorCode, ErrorReport, FromHub, LOGIN_KIND, Login, Nonce, REDEEM_KIND,
        Redeem, SessionKind, proof_text,
    },
    ids::{CredentialId, ServiceId, WorkspaceId},
    keys::WrapPublicKey,
    log::Head,
    objects::{Certificate, Credential, CredentialKind, Genesis, UnixTime},
    signed::{Body, Signed},
    trust::{Presented, TrustError, TrustState, VerifiedPeer},
};

use crate::{
    audit,
    config::Registration,
    router::Member,
    store::{AgentLogin, KnownAgent, NewCredential, Store, StoreError, Upserted, WorkspaceTx},
    trust::TrustCache,
};

/// Why a login or a redemption came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum Denied {
    /// The agent is told this.
    #[error("{}", .0.message)]
    Report(ErrorReport),
    /// Our own trouble; the agent learns only that.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Denied {
    fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self::Report(ErrorReport::new(code, message))
    }
}

/// The names under which this hub may be dialled.
///
/// A proof made for another name was made for another hub, which may be relaying it here.
#[derive(Debug, Clone)]
pub struct Authorities {
    names: BTreeSet<String>,
    /// Whether every name of the loopback interface is ours too.
    loopback: bool,
}

impl Authorities {
    /// `names` as `host:port` (and as `host` where the port is the scheme's own), in lower case.
    #[must_use]
    pub fn new(names: BTreeSet<String>, loopback: bool) -> Self {
        Self { names, loopback }
    }

    fn accept(&self, authority: &str) -> bool {
        let authority = authority.to_ascii_lowercase();
        if self.names.contains(&authority) {
            return true;
        }
        let host = match authority.rsplit_once(':') {
            Some((host, port)) if port.bytes().all(|c| c.is_ascii_digit()) => host,
            Some(_) | None => &authority,
        };
        self.loopback && is_loopback_name(host)
    }
}

/// Whether a host, as a URL spells it, is this machine for certain.
#[must_use]
pub fn is_loopback_name(host: &str) -> bool {
    let address = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    host == "localhost" || address.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// An address as it is stored: the network that it is in, /24 of IPv4 and /48 of IPv6.
#[must_use]
pub fn mask_address(address: IpAddr) -> String {
    match address.to_canonical() {
        IpAddr::V4(address) => {
            let [a, b, c, _] = address.octets();
            format!("{a}.{b}.{c}.0/24")
        }
        IpAddr::V6(address) => {
            let [a, b, c, ..] = address.segments();
            format!("{a:x}:{b:x}:{c:x}::/48")
        }
    }
}

/// Seconds since 1970.
#[must_use]
pub fn unix_now() -> UnixTime {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// A login that succeeded.
#[derive(Debug)]
pub struct LoggedIn {
    /// Who.
    pub member: Member,
    /// What the agent exposed before, when this is its own session.
    pub services: HashSet<ServiceId>,
    /// The hub's head of the trust log.
    pub head: Head,
}

/// What comes of a login that is not denied.
#[derive(Debug)]
pub enum Admission {
    /// The agent is in.
    In(LoggedIn),
    /// It has to log in once more, with this newer certificate.
    Renewed(Blob),
}

/// What the checks depend on besides the message.
#[derive(Debug, Clone, Copy)]
pub struct Context<'a> {
    /// Where workspaces are.
    pub store: &'a Store,
    /// What their logs say.
    pub trust: &'a TrustCache,
    /// For what is refused.
    pub audit: &'a audit::Queue,
    /// Our names.
    pub authorities: &'a Authorities,
    /// Who may create a workspace.
    pub registration: Registration,
    /// The challenge of this connection.
    pub nonce: &'a Nonce,
    /// Where the connection comes from.
    pub address: IpAddr,
}

/// Answers the holder of an invite with what it needs to join.
///
/// # Errors
/// [`Denied`].
pub async fn redeem(context: Context<'_>, redeem: &Redeem) -> Result<FromHub, Denied> {
    check_authority(context, &redeem.authority)?;
    let id = CredentialId::of(&redeem.invite_key);
    let text = proof_text(
        &redeem.authority,
        context.nonce,
        &redeem.agent_nonce,
        id.as_bytes(),
        &redeem.workspace_id,
    );
    redeem
        .invite_key
        .verify(REDEEM_KIND, &text, &redeem.signature)
        .map_err(|_| Denied::new(ErrorCode::Unauthorized, "the proof does not hold"))?;

    let mut tx = context.store.workspace(redeem.workspace_id).await?;
    // Asked of every workspace: whether there is one shows neither in the answer nor in its time.
    let (trust, workspace) = (context.trust.current(&mut tx).await?, tx.find_workspace().await?);
    let (credential, wrap) = (tx.find_credential(id).await?, tx.newest_credential_wrap(id).await?);
    let (Some(trust), Some(workspace)) = (trust, workspace) else {
        return Err(invite_unknown());
    };
    if trust.state.is_closed(&id) {
        return Err(invite_closed());
    }
    let Some(credential) = credential else {
        return Err(invite_unknown());
    };
    let signed: Signed<Credential> =
        Signed::decode(&credential.credential).map_err(|_| StoreError::Corrupt("credential"))?;
    // The secret of a share is in its code.
    if wrap.is_none() && signed.object().kind == CredentialKind::Invite {
        return Err(invite_unknown());
    }
    if trust.state.verify_credential(&signed).is_err() {
        return Err(Denied::new(
            ErrorCode::InviteExpired,
            "the invite ended with the signer that made it",
        ));
    }
    if unix_now() > credential.join_until {
        return Err(Denied::new(ErrorCode::InviteExpired, "the invite has expired"));
    }
    if credential.used >= credential.uses {
        return Err(invite_used());
    }
    Ok(FromHub::Invitation {
        genesis: workspace.genesis.into(),
        credential: credential.credential.into(),
        wrap,
    })
}

/// Verifies a login and stores what the agent shows; creates the workspace when asked and allowed to.
///
/// # Errors
/// [`Denied`]; nothing is stored then.
pub async fn login(context: Context<'_>, login: &Login) -> Result<Admission, Denied> {
    check_authority(context, &login.authority)?;
    let presented = Presented {
        certificate: object(&login.presented.certificate)?,
        credential: login.presented.credential.as_ref().map(object::<Credential>).transpose()?,
        noise_key: object(&login.presented.noise_key)?,
    };
    verify_proof(context, login, presented.certificate.object())?;
    let agent_id = presented.certificate.object().agent_id();
    let genesis = login.create.as_ref().map(|create| verify_genesis(login.workspace_id, create));
    let genesis = genesis.transpose()?;
    loop {
        let mut tx = context.store.workspace(login.workspace_id).await?;
        let trust = context.trust.current(&mut tx).await?.map(|known| known.state);
        let known = tx.lock_agent(agent_id).await?;
        // If it is there, it was created before, perhaps by this very agent, whose answer got lost.
        let Some(trust) = trust.or_else(|| genesis.clone().map(Into::into)) else {
            pretend_to_judge(login.workspace_id, &presented);
            return Err(stranger());
        };
        if let Some(certificate) = newer_certificate(&trust, known.as_ref(), &presented)? {
            return Ok(Admission::Renewed(certificate));
        }
        let is_known = known.is_some();
        let admit = async {
            let verified = trust
                .verify_peer(agent_id, presented.clone(), unix_now())
                .map_err(|error| not_a_member(error, is_known))?;
            check_wrap_key(login, &verified)?;
            let mut events = Vec::new();
            if let Some(create) = &login.create {
                let created = create_workspace(context.registration, &mut tx, create).await?;
                events.extend(created.then(|| {
                    let by_token = context.registration == Registration::Token;
                    let address = mask_address(context.address);
                    audit::now(Event::WorkspaceCreated { agent_id, by_token, address })
                }));
            }
            let stored =
                store_agent(context, &mut tx, login, &trust, &verified, known, &mut events).await?;
            Ok((verified, stored, events))
        };
        let (verified, stored, events) = admit.await.inspect_err(|denied| {
            // Whoever is not known here writes nothing into the audit log of others.
            if let Denied::Report(report) = denied
                && is_known
            {
                let (code, address) = (report.code, mask_address(context.address));
                let refused = Event::LoginRefused { agent_id, code, count: 1, address };
                context.audit.add(login.workspace_id, refused);
            }
        })?;
        match stored {
            Upserted::Done => {}
            Upserted::Raced => continue,
            Upserted::TooMany => {
                return Err(Denied::new(
                    ErrorCode::Busy,
                    "the workspace has as many agents as this hub keeps for it",
                ));
            }
        }
        let services = match login.session {
            SessionKind::Agent => tx.services_of(agent_id).await?,
            SessionKind::Command => HashSet::new(),
        };
        tx.record(&events).await?;
        tx.commit().await?;
        let share = verified.credential_id().zip(verified.services().map(<[ServiceId]>::to_vec));
        let certificate = verified.certificate();
        let member = Member {
            key: (login.workspace_id, agent_id),
            identity: certificate.identity_key,
            serial: certificate.serial,
            role: certificate.role,
            share,
        };
        return Ok(Admission::In(LoggedIn { member, services, head: trust.head() }));
    }
}

fn check_authority(context: Context<'_>, authority: &str) -> Result<(), Denied> {
    if context.authorities.accept(authority) {
        return Ok(());
    }
    Err(Denied::new(
        ErrorCode::WrongAuthority,
        "this hub does not answer to the name that was dialled; its operator can add it with --public-url",
    ))
}

/// For whom a workspace does not know, as for everybody where there is none: one answer, so that nobody
/// can ask which workspaces there are.
fn stranger() -> Denied {
    Denied::new(
        ErrorCode::UnknownWorkspace,
        "this hub does not know the workspace, or the workspace does not know this agent",
    )
}

/// Takes the time that [`TrustState::verify_peer`] takes with a stranger.
fn pretend_to_judge(workspace: WorkspaceId, presented: &Presented) {
    let (certificate, noise_key) = (presented.certificate.object(), presented.noise_key.object());
    if certificate.workspace_id == workspace && noise_key.workspace_id == workspace {
        // Nobody is admitted by it, whatever comes of it.
        let _ = presented.noise_key.verify_by(&certificate.identity_key);
    }
}

fn invite_unknown() -> Denied {
    Denied::new(ErrorCode::InviteUnknown, "this hub knows no such invite")
}

fn invite_closed() -> Denied {
    Denied::new(ErrorCode::InviteExpired, "the invite is closed")
}

/// What an agent is told that does not pass. One that was never here learns it of its invite, and nothing
/// unless its chain led to the workspace.
fn not_a_member(error: TrustError, was_member: bool) -> Denied {
    if error == TrustError::Closed && !was_member {
        return invite_closed();
    }
    let is_chained = matches!(
        error,
        TrustError::Closed | TrustError::Revoked | TrustError::Expired | TrustError::Exceeds
    );
    if !was_member && !is_chained {
        return stranger();
    }
    let ended = matches!(error, TrustError::Closed | TrustError::Revoked);
    let code = if ended { ErrorCode::Revoked } else { ErrorCode::Unauthorized };
    Denied::new(code, error.to_string())
}

fn invite_used() -> Denied {
    Denied::new(ErrorCode::InviteUsed, "the invite has been used")
}

/// Reads an object of a peer.
fn object<T: Body>(wire: &Blob) -> Result<Signed<T>, Denied> {
    Signed::decode(&wire.0)
        .map_err(|error| Denied::new(ErrorCode::Unauthorized, format!("{}: {error}", T::KIND)))
}

fn verify_genesis(workspace: WorkspaceId, create: &CreateWorkspace) -> Result<TrustState, Denied> {
    let genesis: Signed<Genesis> = object(&create.genesis)?;
    TrustState::from_genesis(workspace, &genesis)
        .map_err(|error| Denied::new(ErrorCode::Unauthorized, error.to_string()))
}

/// The identity key of the certificate must have signed for this connection.
fn verify_proof(
    context: Context<'_>,
    login: &Login,
    certificate: &Certificate,
) -> Result<(), Denied> {
    let text = proof_text(
        &login.authority,
        context.nonce,
        &login.agent_nonce,
        certificate.agent_id().as_bytes(),
        &login.workspace_id,
    );
    certificate
        .identity_key
        .verify(LOGIN_KIND, &text, &login.signature)
        .map_err(|_| Denied::new(ErrorCode::Unauthorized, "the proof does not hold"))
}

fn check_wrap_key(login: &Login, verified: &VerifiedPeer) -> Result<(), Denied> {
    let hash = WrapPublicKey::decode(&login.wrap_key.0).map(|key| key.hash());
    if hash != Some(verified.presented().noise_key.object().wrap_key_hash) {
        return Err(Denied::new(
            ErrorCode::Unauthorized,
            "the wrap key is not the one that the NoiseKey binds",
        ));
    }
    Ok(())
}

/// A certificate that the hub has for an agent and that follows the one presented, if it holds: one that
/// a signer left for it, or the one of its last login, which it may have lost since.
fn newer_certificate(
    trust: &TrustState,
    known: Option<&KnownAgent>,
    presented: &Presented,
) -> Result<Option<Blob>, StoreError> {
    let Some(known) = known else {
        return Ok(None);
    };
    let agent = presented.certificate.object().agent_id();
    for wire in [known.renewal.as_ref(), Some(&known.certificate)].into_iter().flatten() {
        let certificate: Signed<Certificate> =
            Signed::decode(wire).map_err(|_| StoreError::Corrupt("certificate"))?;
        if certificate.object().serial <= presented.certificate.object().serial {
            continue;
        }
        let renewed =
            Presented { certificate, credential: None, noise_key: presented.noise_key.clone() };
        if trust.verify_peer(agent, renewed, unix_now()).is_ok() {
            return Ok(Some(wire.clone().into()));
        }
    }
    Ok(None)
}

/// Creates the workspace, if it is not there; whether it was not.
async fn create_workspace(
    registration: Registration,
    tx: &mut WorkspaceTx,
    create: &CreateWorkspace,
) -> Result<bool, Denied> {
    if !tx.insert_workspace(&create.genesis.0).await? {
        return Ok(false);
    }
    match (registration, &create.registration_token) {
        (Registration::Open, _) => Ok(true),
        (Registration::Token, Some(token)) if tx.spend_registration_token(token).await? => Ok(true),
        (Registration::Token, Some(_)) => Err(Denied::new(
            ErrorCode::RegistrationClosed,
            "the registration token is unknown, used or expired",
        )),
        (Registration::Token, None) => Err(Denied::new(
            ErrorCode::RegistrationClosed,
            "creating a workspace here needs a registration token",
        )),
    }
}

/// Stores what a verified agent shows, unless the hub knows something newer of it.
async fn store_agent(
    context: Context<'_>,
    tx: &mut WorkspaceTx,
    login: &Login,
    trust: &TrustState,
    verified: &VerifiedPeer,
    known: Option<KnownAgent>,
    events: &mut Vec<Recorded>,
) -> Result<Upserted, Denied> {
    let noise_key_counter = i64::try_from(verified.noise_key_counter()).map_err(|_| {
        Denied::new(ErrorCode::BadRequest, "the NoiseKey's counter is out of range")
    })?;
    let address = mask_address(context.address);
    let row = AgentLogin {
        agent_id: verified.agent_id(),
        identity_key: verified.identity_key(),
        presented: &login.presented,
        credential_id: verified.credential_id(),
        noise_key_counter,
        static_key: verified.static_key(),
        wrap_key: &login.wrap_key.0,
        address: &address,
    };
    if let Some(known) = &known {
        if noise_key_counter < known.noise_key_counter {
            return Err(Denied::new(
                ErrorCode::Stale,
                "the hub knows a newer NoiseKey of this agent",
            ));
        }
        if noise_key_counter == known.noise_key_counter && row.static_key != known.static_key {
            tracing::warn!(
                event = "clone",
                agent = %row.agent_id,
                "two machines use one agent identity: its home was copied; have the copy stopped"
            );
            return Err(Denied::new(
                ErrorCode::Clone,
                "another machine uses the identity of this agent: its home directory was copied; stop the copy",
            ));
        }
    }
    if let Some(credential) = &verified.presented().credential {
        let id = credential.object().id();
        if known.as_ref().is_none_or(|known| known.credential_id != Some(id)) {
            if trust.is_closed(&id) {
                // And the certificate is one that its closure keeps: the agent joined before, and this
                // hub forgot it, or was not the one.
                remember_credential(tx, credential, login).await?;
            } else {
                spend_credential(tx, credential).await?;
            }
        }
    }
    let agent_id = row.agent_id;
    match known {
        Some(known) => {
            if row.static_key != known.static_key {
                let counter = verified.noise_key_counter();
                events.push(audit::now(Event::KeyRotated { agent_id, counter }));
            }
            tx.update_agent(&row).await?;
            Ok(Upserted::Done)
        }
        None => {
            events.push(audit::now(Event::AgentEnrolled {
                agent_id,
                role: verified.certificate().role,
                credential_id: row.credential_id,
                address: address.clone(),
            }));
            Ok(tx.insert_agent(&row).await?)
        }
    }
}

/// Whether the credential that is stored is the one presented; `None` when there is none. The id names the
/// invite key only.
async fn stored_credential(
    tx: &mut WorkspaceTx,
    presented: &Signed<Credential>,
) -> Result<Option<bool>, StoreError> {
    let stored = tx.find_credential(presented.object().id()).await?;
    Ok(stored.map(|row| {
        Signed::<Credential>::decode(&row.credential)
            .is_ok_and(|stored| stored.hash() == presented.hash())
    }))
}

/// Stores a closed credential that is not known here, for the chain of the agent that joined by it.
async fn remember_credential(
    tx: &mut WorkspaceTx,
    credential: &Signed<Credential>,
    login: &Login,
) -> Result<(), Denied> {
    match stored_credential(tx, credential).await? {
        Some(true) => return Ok(()),
        Some(false) => return Err(invite_unknown()),
        None => {}
    }
    let object = credential.object();
    let (Some(wire), Ok(join_until), Ok(certs_end)) = (
        &login.presented.credential,
        i64::try_from(object.join_until),
        i64::try_from(object.certs_end),
    ) else {
        return Err(Denied::new(ErrorCode::BadRequest, "a time of the credential is out of range"));
    };
    let new = NewCredential {
        id: object.id(),
        credential: &wire.0,
        kind: object.kind,
        uses: object.uses,
        join_until,
        certs_end,
        open: None,
    };
    tx.insert_credential(&new).await?;
    Ok(())
}

/// Counts the join of one agent under a credential.
async fn spend_credential(
    tx: &mut WorkspaceTx,
    credential: &Signed<Credential>,
) -> Result<(), Denied> {
    let id = credential.object().id();
    if stored_credential(tx, credential).await? != Some(true) {
        return Err(invite_unknown());
    }
    if unix_now() > credential.object().join_until {
        return Err(Denied::new(ErrorCode::InviteExpired, "the invite has expired"));
    }
    if !tx.spend_credential_use(id).await? {
        return Err(invite_used());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_stored_as_networks() {
        for (address, masked) in [
            ("192.0.2.77", "192.0.2.0/24"),
            ("::ffff:192.0.2.77", "192.0.2.0/24"),
            ("2001:db8:1:2:3:4:5:6", "2001:db8:1::/48"),
            ("::1", "0:0:0::/48"),
        ] {
            assert_eq!(mask_address(address.parse().unwrap()), masked);
        }
    }

    #[test]
    fn only_our_own_names_are_accepted() {
        let names = ["hub.example:443", "hub.example"].map(str::to_owned).into();
        let public = Authorities::new(names, false);
        let local = Authorities::new(BTreeSet::new(), true);
        for (authority, by_public, by_local) in [
            ("hub.example:443", true, false),
            ("HUB.example", true, false),
            ("hub.example:7420", false, false),
            ("hub.example.evil:443", false, false),
            ("localhost:7420", false, true),
            ("127.0.0.1:7420", false, true),
            ("127.9.9.9", false, true),
            ("[::1]:7420", false, true),
            ("localhost.evil:7420", false, false),
            ("127.0.0.1.evil:7420", false, false),
            ("", false, false),
        ] {
            assert_eq!(public.accept(authority), by_public, "{authority}");
            assert_eq!(local.accept(authority), by_local, "{authority}");
        }
    }
}

//! Becoming a member: a new workspace, an invite, or joining by one.

use std::{sync::Arc, time::Duration};

use connect_crypto::{
    CryptoError,
    epoch::{EpochSecrets, ShareSecret},
    founding::Founding,
    invite::{HubAddress, Invite, InviteKeys, InviteSeed},
    keys::{SigningKey, StaticKeypair, WrapKeypair},
};
use connect_spec::{
    bytes::Blob,
    control::{CreateWorkspace, RegistrationToken, Request, SessionKind},
    ids::{AgentId, CredentialId, Label, WorkspaceId},
    limits::{CLOCK_TOLERANCE, MAX_CERTS, MAX_LOG_BYTES},
    log::LogEntry,
    objects::{
        AgentRole, Attributes, Certificate, Credential, CredentialKind, Issuer, NoiseKey, SUITE_1,
    },
    signed::Signed,
    trust::Presented,
};
use zeroize::Zeroizing;

use crate::{
    clock,
    directory::Directory,
    error::{Error, ErrorKind, Result},
    home::{Home, HomeLock},
    identity::{Epochs, Identity, NoiseIdentity, SignerKey},
    io::{dial::HubUrl, hub::Greeted, tls::HubCa},
    random,
    trust::{Taken, TrustLog},
    workspace::Workspace,
};

/// The invite that `init` prints is good for this long.
pub const FIRST_INVITE: Duration = Duration::from_secs(3600);

/// What `init` leaves to a person.
#[derive(Debug)]
pub struct Founded {
    /// The new workspace.
    pub workspace_id: WorkspaceId,
    /// Its first agent: this home.
    pub agent_id: AgentId,
    /// 24 words that restore the workspace when every signer is lost. Shown once, stored nowhere.
    pub recovery_words: Zeroizing<String>,
    /// An invite for the next machine: one use, one hour.
    pub invite: Zeroizing<String>,
}

/// Creates a workspace at a hub and makes this home its first agent and signer. The hub's certificate is
/// verified by `ca` if it is given, by the address's pin or by the system's authorities, now and later.
///
/// # Errors
/// [`ErrorKind::Usage`] when the home is enrolled already (it is left unchanged) or the address is
/// wrong; [`ErrorKind::HubUnreachable`]; [`ErrorKind::Refused`] when the hub wants a token.
pub async fn init(
    home: &Home,
    hub: &HubAddress,
    ca: Option<HubCa>,
    label: &Label,
    token: Option<String>,
) -> Result<Founded> {
    let _lock = claim(home)?;
    let url = HubUrl::parse(hub, ca.as_ref())?;
    let greeted = Greeted::dial(&url).await?;

    let Founding { genesis, signer, recovery, epoch } = Founding::create(&mut random::rng());
    let workspace_id = WorkspaceId(genesis.hash());
    let log = TrustLog::create(home, workspace_id, Arc::new(genesis.clone()))?;
    let attrs = Attributes::new(random::bytes(), Vec::new()).expect("no tag is no bad tag");
    let keys = AgentKeys::generate();
    let certificate = signer.sign(&Certificate {
        workspace_id,
        identity_key: keys.signing.public(),
        role: AgentRole::Member,
        attrs: attrs.hash(),
        serial: 1,
        not_after: None,
        issuer: Issuer::Signer(signer.public()),
        services: None,
    });
    let create = CreateWorkspace {
        genesis: Blob(genesis.encode()),
        registration_token: token.map(RegistrationToken),
    };
    let presented =
        Presented { certificate, credential: None, noise_key: keys.noise_key(workspace_id) };
    let epochs = Epochs::only(0, epoch);
    let hub = hub.clone();
    let joined = Joined { hub, hub_ca: ca, epochs, presented, attrs, log, share_label: None };
    let (identity, log) = keys.into_identity(joined, label);
    let agent_id = identity.agent_id;
    let signer = Arc::new(signer);
    let identity = Identity { signer: Some(SignerKey::Open(signer.clone())), ..identity };
    let directory = register(home, identity, log, greeted, None, Some(create)).await?;
    let invite = invite(&directory, &signer, FIRST_INVITE, 1, Vec::new()).await?;
    Ok(Founded { workspace_id, agent_id, recovery_words: recovery.words(), invite })
}

/// Joins the workspace of an invite; `ca` is as for [`init`]. By the code of a share it becomes a guest: of a
/// home that is enrolled already in a home of its own inside that one ([`Home::of_share`]).
///
/// # Errors
/// [`ErrorKind::Usage`] for a damaged code, or an invite where the home is enrolled (it is left unchanged);
/// [`ErrorKind::TrustViolation`] when the hub shows another workspace than the invite names;
/// [`ErrorKind::Refused`] when the invite is used up or expired.
pub async fn join(
    home: &Home,
    code: &str,
    ca: Option<HubCa>,
    label: &Label,
) -> Result<Arc<Identity>> {
    let invite: Invite = code.parse().map_err(|error| {
        Error::new(ErrorKind::Usage, error).hint("paste the whole code, from `pc1` to its end")
    })?;
    let home = match &invite.share {
        Some(_) if home.is_enrolled() => {
            let id = CredentialId::of(&InviteKeys::derive(&invite.seed).signing.public());
            let share = home.of_share(&id);
            if share.is_enrolled() || home.load()?.share_id() == Some(id) {
                return Err(Error::new(ErrorKind::Usage, "this home joined the share already")
                    .hint("`connect services` lists what it brings"));
            }
            share
        }
        Some(_) | None => home.clone(),
    };
    let _lock = claim(&home)?;
    let joined = join_claimed(&home, invite, ca, label).await;
    if joined.is_err() {
        home.forget();
    }
    joined
}

async fn join_claimed(
    home: &Home,
    invite: Invite,
    ca: Option<HubCa>,
    label: &Label,
) -> Result<Arc<Identity>> {
    let url = HubUrl::parse(&invite.hub, ca.as_ref())?;
    let mut greeted = Greeted::dial(&url).await?;
    let invite_keys = InviteKeys::derive(&invite.seed);
    let invitation = greeted.redeem(invite.workspace_id, &invite_keys).await?;

    // Everything that the hub handed out is held against the anchor in the invite.
    let genesis = Signed::decode(&invitation.genesis.0)
        .map_err(|_| Error::trust("the hub shows a malformed genesis"))?;
    let mut log = TrustLog::create(home, invite.workspace_id, Arc::new(genesis))?;
    fetch_log(&mut greeted, &mut log).await?;
    if !log.knows(&invite.head) {
        return Err(Error::trust(
            "the hub shows a trust log that does not contain the place that the invite names: it is \
             older than the invite, or another one",
        ));
    }
    let trust = log.state().clone();
    let credential: Signed<Credential> = Signed::decode(&invitation.credential.0)
        .map_err(|_| Error::trust("the hub shows a malformed credential"))?;
    trust.verify_credential(&credential).map_err(Error::trust)?;
    let granted = credential.object();
    if granted.invite_key != invite_keys.signing.public()
        || granted.wrap_key_hash != invite_keys.wrap.public().hash()
    {
        return Err(Error::trust("the hub shows the credential of another invite"));
    }
    if (granted.kind == CredentialKind::Share) != invite.share.is_some() {
        return Err(Error::trust("the code and its credential are not of one kind"));
    }
    let refused = |why: &str| {
        let make = if invite.share.is_some() { "connect share" } else { "connect invite" };
        Error::new(ErrorKind::Refused, format_args!("the {} {why}", granted_as(granted)))
            .hint(format_args!("ask for a new code: `{make}` on a machine of the workspace"))
    };
    if trust.is_closed(&granted.id()) {
        return Err(refused("was closed by a signer"));
    }
    // The hub judges that to the second; this clock may be wrong.
    if clock::now() > granted.join_until.saturating_add(CLOCK_TOLERANCE.as_secs()) {
        return Err(refused("has expired"));
    }
    let epochs = match &invite.share {
        Some(share) => Epochs::of_share(&share.secret),
        None => {
            let unopened = || Error::trust("the workspace's secrets in the invite do not open");
            let wrap = invitation.wrap.ok_or_else(unopened)?;
            let commit = trust.epoch_commit(wrap.epoch).ok_or_else(unopened)?;
            let secrets =
                EpochSecrets::open(&wrap, &invite.workspace_id, &invite_keys.wrap, commit)
                    .map_err(|_: CryptoError| unopened())?;
            // The wrap opens for its own epoch alone.
            Epochs::only(wrap.epoch, secrets)
        }
    };
    let attrs =
        invite.attributes().ok().filter(|attrs| attrs.hash() == granted.attrs).ok_or_else(
            || Error::trust("the tags in the invite are not those of its credential"),
        )?;

    let keys = AgentKeys::generate();
    let certificate = invite_keys.signing.sign(&Certificate {
        workspace_id: invite.workspace_id,
        identity_key: keys.signing.public(),
        role: granted.role,
        attrs: granted.attrs,
        serial: 1,
        not_after: None,
        issuer: Issuer::Credential(credential.hash()),
        services: granted.services.clone(),
    });
    let presented = Presented {
        certificate,
        credential: Some(credential),
        noise_key: keys.noise_key(invite.workspace_id),
    };
    let hub = invite.hub;
    let share_label = invite.share.as_ref().map(|share| share.label.clone());
    let joined = Joined { hub, hub_ca: ca, epochs, presented, attrs, log, share_label };
    let (identity, log) = keys.into_identity(joined, label);
    let secret = invite.share.as_ref().map(|share| &share.secret);
    let directory = register(home, identity, log, greeted, secret, None).await?;
    Ok(directory.workspace().identity())
}

fn granted_as(credential: &Credential) -> &'static str {
    match credential.kind {
        CredentialKind::Invite => "invite",
        CredentialKind::Share => "share",
    }
}

/// Fetches the whole trust log for a new agent, which verifies it entry by entry.
async fn fetch_log(greeted: &mut Greeted, log: &mut TrustLog) -> Result<()> {
    let mut bytes = 0;
    loop {
        let (wires, more) = greeted.fetch_log(log.locator()).await?;
        bytes += wires.iter().map(|wire| wire.0.len() as u64).sum::<u64>();
        let entries: std::result::Result<Vec<_>, _> =
            wires.iter().map(|wire| LogEntry::decode(&wire.0)).collect();
        let entries = entries
            .map_err(|_| Error::trust("the hub shows a malformed entry of the trust log"))?;
        let taken = log.take(&entries)?;
        if !more {
            return Ok(());
        }
        if taken != Taken::Grew || bytes > 2 * MAX_LOG_BYTES {
            return Err(Error::trust("the hub shows a trust log without an end"));
        }
    }
}

/// Makes an invite, signed by `signer` ([`Identity::signing_key`]), and leaves its public half at the hub.
/// Returns the code, which is a secret.
///
/// # Errors
/// [`ErrorKind::Usage`] for a bad tag; as a request to the hub.
pub async fn invite(
    directory: &Directory,
    signer: &SigningKey,
    expires: Duration,
    uses: u32,
    tags: Vec<String>,
) -> Result<Zeroizing<String>> {
    let identity = directory.workspace().identity();
    let invite = Invite {
        hub: identity.hub.clone(),
        workspace_id: identity.workspace_id(),
        head: identity.trust.head(),
        seed: InviteSeed::generate(&mut random::rng()),
        tags,
        share: None,
    };
    let keys = InviteKeys::derive(&invite.seed);
    let attrs = invite.attributes().map_err(|tag| {
        Error::new(ErrorKind::Usage, format_args!("`{tag}` cannot be a tag here"))
            .hint("a tag has 1 to 32 of a-z, 0-9 and `-`; an invite has at most 16")
    })?;
    let now = clock::now();
    let wrap_key = keys.wrap.public();
    let credential = signer.sign(&Credential {
        workspace_id: invite.workspace_id,
        kind: CredentialKind::Invite,
        invite_key: keys.signing.public(),
        role: AgentRole::Member,
        attrs: attrs.hash(),
        services: None,
        uses,
        join_until: now.saturating_add(expires.as_secs()),
        certs_end: now.saturating_add(MAX_CERTS.as_secs()),
        issuer: signer.public(),
        wrap_key_hash: wrap_key.hash(),
    });
    let epoch = identity.epochs.current();
    let wrap = epoch
        .secrets
        .wrap(&invite.workspace_id, epoch.number, &wrap_key, &mut random::rng())
        .map_err(|error| Error::new(ErrorKind::Other, error))?;
    directory
        .session()
        .request(Request::CreateCredential {
            credential: Blob(credential.encode()),
            wrap_key: Blob(wrap_key.encode()),
            wrap,
        })
        .await?;
    Ok(invite.reveal())
}

/// What makes an agent a member, beside its own keys.
struct Joined {
    hub: HubAddress,
    hub_ca: Option<HubCa>,
    epochs: Epochs,
    presented: Presented,
    attrs: Attributes,
    log: TrustLog,
    /// Of a guest.
    share_label: Option<Label>,
}

/// The keys of a new agent.
struct AgentKeys {
    signing: SigningKey,
    static_keypair: StaticKeypair,
    wrap: WrapKeypair,
}

impl AgentKeys {
    fn generate() -> Self {
        let mut rng = random::rng();
        Self {
            signing: SigningKey::generate(&mut rng),
            static_keypair: StaticKeypair::generate(&mut rng),
            wrap: WrapKeypair::generate(&mut rng),
        }
    }

    /// The member with these keys; it holds no signer key.
    fn into_identity(self, joined: Joined, label: &Label) -> (Identity, TrustLog) {
        let Joined { hub, hub_ca, epochs, presented, attrs, log, share_label } = joined;
        let trust = log.state().clone();
        let identity = Identity {
            hub,
            hub_ca,
            label: label.clone(),
            agent_id: AgentId::of(&trust.workspace_id(), &self.signing.public()),
            signing: Arc::new(self.signing),
            wrap: Arc::new(self.wrap),
            noise: Arc::new(NoiseIdentity {
                static_keypair: self.static_keypair,
                presented,
                made: clock::now(),
            }),
            retired_noise: None,
            epochs: Arc::new(epochs),
            attrs: Arc::new(attrs),
            genesis: log.genesis().clone(),
            trust,
            signer: None,
            share_label,
        };
        (identity, log)
    }

    fn noise_key(&self, workspace_id: WorkspaceId) -> Signed<NoiseKey> {
        self.signing.sign(&NoiseKey {
            workspace_id,
            agent_id: AgentId::of(&workspace_id, &self.signing.public()),
            suite: SUITE_1,
            counter: 1,
            static_key: self.static_keypair.public(),
            wrap_key_hash: self.wrap.public().hash(),
        })
    }
}

/// Takes an empty home for a new agent.
fn claim(home: &Home) -> Result<HomeLock> {
    let enrolled = || {
        Error::new(
            ErrorKind::Usage,
            format_args!(
                "an agent lives in `{}` already; nothing was changed",
                home.dir().display()
            ),
        )
        .hint("set CONNECT_HOME to another directory for another agent")
    };
    if home.is_enrolled() {
        return Err(enrolled());
    }
    let lock = home.try_lock()?.ok_or_else(|| {
        Error::new(
            ErrorKind::Other,
            format_args!("another `connect` is at work in `{}`", home.dir().display()),
        )
        .hint("wait for it, or set CONNECT_HOME to another directory")
    })?;
    // Another process may have enrolled the home before the lock was free.
    if home.is_enrolled() { Err(enrolled()) } else { Ok(lock) }
}

/// Saves the identity, then shows it to the hub; a refusal takes it back from disk.
///
/// In this order a crash in between leaves an agent that the hub gets to know at its next login,
/// and not a spent invite with nothing to show for it.
async fn register(
    home: &Home,
    identity: Identity,
    log: TrustLog,
    greeted: Greeted,
    share: Option<&ShareSecret>,
    create: Option<CreateWorkspace>,
) -> Result<Directory> {
    home.save(&identity, share)?;
    let workspace = Workspace::new(home, identity, log);
    let registered = async {
        let (session, _) = greeted.login(&workspace, SessionKind::Command, create).await?;
        let directory = Directory::new(workspace.clone(), Arc::new(session));
        directory.publish_agent(1).await?;
        Ok(directory)
    };
    let registered = registered.await;
    if registered.is_err() {
        home.forget();
    }
    registered
}

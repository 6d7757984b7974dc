//! The workspace as this agent knows it: the trust log, the epochs, and itself in it.
//!
//! Everything that learns of entries, whether from the hub or from a peer, ends in [`Workspace::learn`];
//! everybody else looks at the [`Identity`] that follows from them.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use connect_crypto::epoch::EpochSecrets;
use connect_spec::{
    bytes::Blob,
    control::{
        AddressedWrap, ErrorCode, Recipient, Reply, Request, UnwrappedAgent, UnwrappedCredential,
    },
    keys::WrapPublicKey,
    limits::{MAX_LOG_BYTES, OLD_EPOCH},
    log::{Head, LogEntry},
    objects::{AgentRole, Certificate, Credential, CredentialKind},
    signed::Signed,
    trust::Presented,
};
use tokio::sync::watch;

use crate::{
    clock,
    directory::unexpected_reply,
    error::{Error, ErrorKind, Result},
    home::Home,
    identity::Identity,
    io::hub::Session,
    local, random,
    trust::{Taken, TrustLog},
};

/// Entries that travel in one request, before base64.
const UPLOAD_BYTES: usize = 44 * 1024;
/// Wraps that travel in one request.
const WRAPS_PER_REQUEST: usize = 24;
/// So often a hub is asked who lacks a wrap; each answer is acted on before the next.
const MAX_WRAP_ROUNDS: usize = 10_000;

/// What the tasks of a process share about the workspace of a home.
#[derive(Debug)]
pub(crate) struct Workspace {
    home: Home,
    log: Mutex<TrustLog>,
    identity: watch::Sender<Arc<Identity>>,
    /// Held while the identity is changed, so that no change is lost.
    changing: Mutex<()>,
    /// The newest epoch whose secrets are held, and since when this process knows it.
    epoch_since: Mutex<(u32, Instant)>,
    beside: Beside,
}

/// Whether another process may be the agent of the home.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Beside {
    /// No: it is this one, or there is none.
    Nobody,
    /// Yes, and it is told of news. That it has to hear of them from the hub must not be: the hub would
    /// say nothing, and an owner's own agent went on with whom the owner revoked.
    Agent,
}

impl Workspace {
    /// Reads the workspace of a home.
    ///
    /// # Errors
    /// As [`Home::load`].
    pub(crate) fn open(home: &Home) -> Result<Arc<Self>> {
        let (identity, log) = home.load_with_log()?;
        Ok(Self::new(home, identity, log))
    }

    /// As [`Workspace::open`], for a process beside the agent of the home, if one runs.
    ///
    /// # Errors
    /// As there.
    pub(crate) fn open_beside_agent(home: &Home) -> Result<Arc<Self>> {
        let (identity, log) = home.load_with_log()?;
        Ok(Arc::new(Self { beside: Beside::Agent, ..Self::of(home, identity, log) }))
    }

    pub(crate) fn new(home: &Home, identity: Identity, log: TrustLog) -> Arc<Self> {
        Arc::new(Self::of(home, identity, log))
    }

    fn of(home: &Home, identity: Identity, log: TrustLog) -> Self {
        Self {
            home: home.clone(),
            log: Mutex::new(log),
            epoch_since: Mutex::new((identity.epochs.current().number, Instant::now())),
            identity: watch::Sender::new(Arc::new(identity)),
            changing: Mutex::default(),
            beside: Beside::Nobody,
        }
    }

    pub(crate) fn home(&self) -> &Home {
        &self.home
    }

    /// What the agent knows of itself at this moment. An operation takes it once.
    pub(crate) fn identity(&self) -> Arc<Identity> {
        self.identity.borrow().clone()
    }

    /// What the agent knows of itself, as it changes.
    pub(crate) fn changes(&self) -> watch::Receiver<Arc<Identity>> {
        self.identity.subscribe()
    }

    /// Replaces what the agent knows of itself; `change` also saves it.
    ///
    /// # Errors
    /// That of `change`: the old one stays.
    pub(crate) fn change_identity(
        &self,
        change: impl FnOnce(&Identity) -> Result<Identity>,
    ) -> Result<Arc<Identity>> {
        let _one_at_a_time = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let changed = Arc::new(change(&self.identity())?);
        let epoch = changed.epochs.current().number;
        let mut since = self.epoch_since.lock().unwrap_or_else(PoisonError::into_inner);
        if since.0 != epoch {
            *since = (epoch, Instant::now());
        }
        drop(since);
        self.identity.send_replace(changed.clone());
        Ok(changed)
    }

    /// Whether records of an epoch count: the current one, and for a day the one before, as exposers may
    /// be away when it changes.
    pub(crate) fn accepts_epoch(&self, number: u32) -> bool {
        let (current, since) = *self.epoch_since.lock().unwrap_or_else(PoisonError::into_inner);
        number == current || (number.checked_add(1) == Some(current) && since.elapsed() < OLD_EPOCH)
    }

    /// Takes over a certificate that a signer left for this agent at the hub.
    ///
    /// # Errors
    /// [`ErrorKind::TrustViolation`] when it is not one by a signer, for this agent.
    pub(crate) fn renew(&self, certificate: &Blob) -> Result<()> {
        let does_not_hold = || Error::trust("the hub shows a new certificate that does not hold");
        let certificate =
            Signed::<Certificate>::decode(&certificate.0).map_err(|_| does_not_hold())?;
        let changed = self.change_identity(|identity| {
            let old = identity.noise.presented.certificate.object();
            let new = certificate.object();
            let changed = identity.with_certificate(certificate.clone());
            let presented = changed.noise.presented.clone();
            identity
                .trust
                .verify_peer(identity.agent_id, presented, clock::now())
                .map_err(|_| does_not_hold())?;
            if new.serial <= old.serial || new.attrs != old.attrs {
                return Err(does_not_hold());
            }
            self.home.save_certificate(&changed)?;
            Ok(changed)
        })?;
        let role = changed.noise.presented.certificate.object().role;
        tracing::warn!(event = "certificate", ?role, "a signer gave this agent a new certificate");
        Ok(())
    }

    /// The log. Held for short looks only.
    pub(crate) fn log(&self) -> MutexGuard<'_, TrustLog> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets `work` at the log, off the threads that drive connections, and then knows what it says.
    pub(crate) async fn with_log<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&mut TrustLog) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let workspace = self.clone();
        let worked = tokio::task::spawn_blocking(move || {
            let mut log = workspace.log();
            let result = work(&mut log);
            let state = log.state().clone();
            drop(log);
            if workspace.identity().trust != state {
                let home = workspace.home.clone();
                workspace.change_identity(|identity| {
                    // A secret that is held already may be confirmed only now.
                    let epochs =
                        home.load_epochs(&state)?.map_or_else(|| identity.epochs.clone(), Arc::new);
                    Ok(Identity { trust: state, epochs, ..identity.clone() })
                })?;
            }
            result
        });
        worked.await.map_err(|error| Error::new(ErrorKind::Other, error))?
    }

    /// Takes entries of the trust log, whoever shows them.
    ///
    /// # Errors
    /// [`ErrorKind::TrustViolation`] for the first one that does not hold; those before it are kept.
    pub(crate) async fn learn(self: &Arc<Self>, entries: Vec<LogEntry>) -> Result<Taken> {
        let taken = self.with_log(move |log| log.take(&entries)).await?;
        if taken == Taken::Grew {
            let head = self.identity().trust.head();
            tracing::info!(seq = head.seq, "the trust log grew");
        }
        if taken != Taken::Nothing && self.beside == Beside::Agent {
            // One that does not answer reads it when it starts.
            let told = local::ask(&self.home, &local::Command::LookAtLog).await;
            tracing::debug!(told = told.is_ok(), "the agent was told of the trust log");
        }
        Ok(taken)
    }

    /// Looks at the beginning of a long list of entries: false when all of them are known.
    ///
    /// # Errors
    /// [`ErrorKind::TrustViolation`] for the first one that does not hold.
    pub(crate) async fn check(self: &Arc<Self>, entries: &[LogEntry]) -> Result<bool> {
        let entries = entries.to_vec();
        self.with_log(move |log| log.check(&entries)).await
    }

    /// Takes over what another process of the home learned.
    ///
    /// # Errors
    /// [`ErrorKind::TrustViolation`] when the files do not hold together.
    pub(crate) async fn look_at_log(self: &Arc<Self>) -> Result<()> {
        self.with_log(TrustLog::reload).await
    }

    /// Makes the own log and the hub's one: fetches what the hub has more, and brings what it lacks.
    ///
    /// # Errors
    /// [`ErrorKind::TrustViolation`] when the hub shows an entry that does not hold.
    pub(crate) async fn sync(self: &Arc<Self>, session: &Session) -> Result<()> {
        // A command in the same home may know more than this process.
        self.with_log(TrustLog::reload).await?;
        let mut have = self.log().locator();
        let mut branch: Vec<LogEntry> = Vec::new();
        let mut bytes = 0;
        let mut holds = false;
        let mut hub_head;
        let mut common = None;
        loop {
            let Reply::Log { after, entries, more } =
                session.request(Request::Log { have }).await?
            else {
                return Err(unexpected_reply());
            };
            hub_head = after;
            common.get_or_insert(after);
            bytes += entries.iter().map(|entry| entry.0.len() as u64).sum::<u64>();
            if bytes > 2 * MAX_LOG_BYTES {
                return Err(Error::trust("the hub shows a trust log that is longer than any"));
            }
            for wire in &entries {
                let entry = LogEntry::decode(&wire.0).map_err(|_| {
                    Error::trust("the hub shows a malformed entry of the trust log")
                })?;
                if entry.follows() != hub_head {
                    return Err(Error::trust("the hub shows a trust log with gaps"));
                }
                hub_head = entry.head();
                branch.push(entry);
            }
            let follows = branch.first().map(LogEntry::follows);
            if follows == Some(self.identity().trust.head()) {
                self.learn(std::mem::take(&mut branch)).await?;
            } else if more && !holds {
                // Not everything that a hub makes up is worth being kept until its end.
                holds = self.check(&branch).await?;
                if !holds {
                    branch.clear();
                }
            }
            if !more || entries.is_empty() {
                break;
            }
            have = vec![hub_head];
        }
        let taken = if branch.is_empty() { Taken::Nothing } else { self.learn(branch).await? };
        let mine = self.identity().trust.head();
        if taken == Taken::Forked || hub_head == mine {
            return Ok(());
        }
        let last = self.log().common(&[hub_head, common.unwrap_or(hub_head)]);
        self.upload(session, last).await
    }

    /// Brings the hub the entries that it lacks: those after the last one that it has too.
    async fn upload(&self, session: &Session, last: Head) -> Result<()> {
        let mut seq = last.seq;
        let mut uploaded = 0;
        loop {
            let wires = self.log().entries_after(seq, UPLOAD_BYTES)?;
            if wires.is_empty() {
                break;
            }
            let count = wires.len() as u64;
            let entries = wires.into_iter().map(Blob).collect();
            let reply = session.try_request(Request::Append { entries }).await?;
            if let Reply::Error(report) = &reply {
                if report.code == ErrorCode::Conflict {
                    tracing::warn!("the hub holds another branch of the trust log");
                    return Ok(());
                }
                return Err(Error::from_hub(report));
            }
            seq += count;
            uploaded += count;
        }
        if uploaded > 0 {
            tracing::info!(
                event = "hub_healed",
                count = uploaded,
                "the hub lacked entries of the trust log that this agent has; it has them now"
            );
        }
        Ok(())
    }

    /// Fetches the secrets of the current epoch, if they are not held yet; false when nobody has made
    /// them available, or what was made is not what the log speaks of. A guest needs none.
    ///
    /// # Errors
    /// As a request to the hub.
    pub(crate) async fn fetch_epoch(self: &Arc<Self>, session: &Session) -> Result<bool> {
        let identity = self.identity();
        let epoch = identity.trust.epoch();
        if identity.epochs.get(epoch).is_some() || identity.share_id().is_some() {
            return Ok(true);
        }
        let Reply::Wrap { wrap } = session.request(Request::OwnWrap { epoch }).await? else {
            return Err(unexpected_reply());
        };
        let commit = identity.trust.epoch_commit(epoch).copied();
        let (Some(wrap), Some(commit)) = (wrap.filter(|wrap| wrap.epoch == epoch), commit) else {
            return Ok(false);
        };
        // Any member can make a wrap, and a bad one must not keep this agent away.
        let Ok(secrets) =
            EpochSecrets::open(&wrap, &identity.workspace_id(), &identity.wrap, &commit)
        else {
            tracing::error!(event = "bad_wrap", epoch, "the secrets of the new epoch do not open");
            return Ok(false);
        };
        let home = self.home.clone();
        self.change_identity(|identity| {
            home.save_epoch(epoch, &secrets)?;
            let epochs =
                home.load_epochs(&identity.trust)?.ok_or_else(|| home.damaged("epochs.key"))?;
            Ok(Identity { epochs: Arc::new(epochs), ..identity.clone() })
        })?;
        tracing::info!(epoch, "names are sealed under a new key from now on");
        Ok(true)
    }

    /// Wraps the secrets of the current epoch to everybody who lacks them.
    ///
    /// # Errors
    /// As a request to the hub.
    pub(crate) async fn wrap_missing(&self, session: &Session) -> Result<()> {
        for _ in 0..MAX_WRAP_ROUNDS {
            let identity = self.identity();
            let epoch = identity.epochs.current().number;
            if epoch != identity.trust.epoch() || identity.share_id().is_some() {
                return Ok(());
            }
            let Reply::MissingWraps { agents, credentials } =
                session.request(Request::MissingWraps { epoch }).await?
            else {
                return Err(unexpected_reply());
            };
            let agents = agents.iter().filter_map(|agent| wrap_for_agent(&identity, agent));
            let credentials = credentials
                .iter()
                .filter_map(|credential| wrap_for_credential(&identity, credential));
            let wraps: Vec<_> = agents.chain(credentials).collect();
            if wraps.is_empty() {
                return Ok(());
            }
            for wraps in wraps.chunks(WRAPS_PER_REQUEST) {
                session.request(Request::StoreWraps { wraps: wraps.to_vec() }).await?;
            }
        }
        Ok(())
    }

    /// Whether this place is in the own log, or the end of a known branch.
    pub(crate) fn knows(&self, head: &Head) -> bool {
        self.log().knows(head)
    }
}

/// A wrap for a member that is verified here; the hub's word that it is one does not do. Guests are verified
/// too, and get none: these secrets are what their share keeps from them.
fn wrap_for_agent(identity: &Identity, agent: &UnwrappedAgent) -> Option<AddressedWrap> {
    let presented = Presented::from_blobs(&agent.presented).ok()?;
    let peer = identity.trust.verify_peer(agent.agent_id, presented, clock::now()).ok()?;
    let key = WrapPublicKey::decode(&agent.wrap_key.0)?;
    if peer.certificate().role == AgentRole::Guest
        || key.hash() != peer.presented().noise_key.object().wrap_key_hash
    {
        return None;
    }
    wrap(identity, Recipient::Agent(agent.agent_id), &key)
}

/// A wrap for whoever holds an invite that a signer made and nobody closed.
fn wrap_for_credential(
    identity: &Identity,
    unwrapped: &UnwrappedCredential,
) -> Option<AddressedWrap> {
    let credential = Signed::<Credential>::decode(&unwrapped.credential.0).ok()?;
    identity.trust.verify_credential(&credential).ok()?;
    let object = credential.object();
    let key = WrapPublicKey::decode(&unwrapped.wrap_key.0)?;
    if object.kind != CredentialKind::Invite
        || identity.trust.is_closed(&object.id())
        || key.hash() != object.wrap_key_hash
    {
        return None;
    }
    wrap(identity, Recipient::Credential(object.id()), &key)
}

fn wrap(identity: &Identity, recipient: Recipient, key: &WrapPublicKey) -> Option<AddressedWrap> {
    let epoch = identity.epochs.current();
    let wrapped =
        epoch.secrets.wrap(&identity.workspace_id(), epoch.number, key, &mut random::rng());
    wrapped.ok().map(|wrap| AddressedWrap { recipient, wrap })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use connect_crypto::keys::{SigningKey, StaticKeypair, WrapKeypair};
    use connect_spec::{
        ids::{AgentId, ServiceId},
        log::{Beat, Change, Entry},
        objects::{Attributes, Issuer, NoiseKey, SUITE_1},
        trust::TrustState,
    };

    use super::*;
    use crate::{
        identity::{SignerKey, tests::identity},
        keeper::verify_beat,
    };

    /// An agent that a founder let in, as the hub lists one without a wrap: by an invite or a share.
    fn joined(founder: &Identity, kind: CredentialKind) -> (SigningKey, UnwrappedAgent) {
        let mut rng = random::rng();
        let Some(SignerKey::Open(signer)) = &founder.signer else { panic!("a founder") };
        let workspace_id = founder.workspace_id();
        let (code, signing) = (SigningKey::generate(&mut rng), SigningKey::generate(&mut rng));
        let (wrap, noise) = (WrapKeypair::generate(&mut rng), StaticKeypair::generate(&mut rng));
        let attrs = Attributes::new([0; 16], Vec::new()).expect("no tag").hash();
        let is_share = kind == CredentialKind::Share;
        let role = if is_share { AgentRole::Guest } else { AgentRole::Member };
        let services = is_share.then(|| vec![ServiceId([1; 16])]);
        let end = clock::now() + 3600;
        let credential = signer.sign(&Credential {
            workspace_id,
            kind,
            invite_key: code.public(),
            role,
            attrs,
            services: services.clone(),
            uses: 1,
            join_until: end,
            certs_end: end,
            issuer: signer.public(),
            wrap_key_hash: wrap.public().hash(),
        });
        let certificate = code.sign(&Certificate {
            workspace_id,
            identity_key: signing.public(),
            role,
            attrs,
            serial: 1,
            not_after: None,
            issuer: Issuer::Credential(credential.hash()),
            services,
        });
        let agent_id = AgentId::of(&workspace_id, &signing.public());
        let noise_key = signing.sign(&NoiseKey {
            workspace_id,
            agent_id,
            suite: SUITE_1,
            counter: 1,
            static_key: noise.public(),
            wrap_key_hash: wrap.public().hash(),
        });
        let presented = Presented { certificate, credential: Some(credential), noise_key };
        let wrap_key = Blob(wrap.public().encode());
        (signing, UnwrappedAgent { agent_id, presented: presented.to_blobs(), wrap_key })
    }

    #[test]
    fn secrets_of_the_workspace_are_not_wrapped_to_guests_whatever_the_hub_lists() {
        let founder = identity();
        let (_, member) = joined(&founder, CredentialKind::Invite);
        assert!(wrap_for_agent(&founder, &member).is_some());
        let (_, guest) = joined(&founder, CredentialKind::Share);
        assert!(wrap_for_agent(&founder, &guest).is_none());
        // Nor to a key that the agent did not bind.
        let other = joined(&founder, CredentialKind::Invite).1.wrap_key;
        assert!(wrap_for_agent(&founder, &UnwrappedAgent { wrap_key: other, ..member }).is_none());
    }

    /// An invite as the hub lists one without a wrap.
    fn unwrapped(
        credential: &Credential,
        by: &SigningKey,
        key: &WrapKeypair,
    ) -> UnwrappedCredential {
        UnwrappedCredential {
            credential: Blob(by.sign(credential).encode()),
            wrap_key: Blob(key.public().encode()),
        }
    }

    #[test]
    fn secrets_of_the_workspace_are_wrapped_to_open_invites_of_signers_alone() {
        let mut rng = random::rng();
        let founder = identity();
        let Some(SignerKey::Open(signer)) = &founder.signer else { panic!("a founder") };
        let (code, other) = (SigningKey::generate(&mut rng), SigningKey::generate(&mut rng));
        let (wrap, other_wrap) = (WrapKeypair::generate(&mut rng), WrapKeypair::generate(&mut rng));
        let end = clock::now() + 3600;
        let invite = Credential {
            workspace_id: founder.workspace_id(),
            kind: CredentialKind::Invite,
            invite_key: code.public(),
            role: AgentRole::Member,
            attrs: [0; 32],
            services: None,
            uses: 1,
            join_until: end,
            certs_end: end,
            issuer: signer.public(),
            wrap_key_hash: wrap.public().hash(),
        };
        let wrapped = |identity: &Identity, unwrapped: &UnwrappedCredential| {
            wrap_for_credential(identity, unwrapped).is_some()
        };
        let sound = unwrapped(&invite, signer, &wrap);
        assert!(wrapped(&founder, &sound));
        assert!(!wrapped(&founder, &unwrapped(&invite, signer, &other_wrap)));
        assert!(!wrapped(&founder, &unwrapped(&invite, &other, &wrap)));
        let by_other = Credential { issuer: other.public(), ..invite.clone() };
        assert!(!wrapped(&founder, &unwrapped(&by_other, &other, &wrap)));
        let share = Credential {
            kind: CredentialKind::Share,
            role: AgentRole::Guest,
            services: Some(vec![ServiceId([1; 16])]),
            ..invite.clone()
        };
        assert!(!wrapped(&founder, &unwrapped(&share, signer, &wrap)));

        let mut trust = TrustState::clone(&founder.trust);
        let closed = Change::CloseCredential { credential_id: invite.id(), keep: Vec::new() };
        let entry = signer.sign(&Entry {
            workspace_id: founder.workspace_id(),
            seq: 1,
            prev: trust.head().hash,
            time: 1,
            changes: vec![closed],
            abandons: Vec::new(),
        });
        trust.apply(&LogEntry::Entry(entry)).expect("by a signer");
        let founder = Identity { trust: Arc::new(trust), ..founder.clone() };
        assert!(!wrapped(&founder, &sound));
    }

    /// The workspace of a founder, in a home of its own.
    fn founded() -> (tempfile::TempDir, Arc<Workspace>) {
        let dir = tempfile::tempdir().expect("a directory");
        let home = Home::at(dir.path().join("home"));
        let identity = identity();
        let log = TrustLog::create(&home, identity.workspace_id(), identity.genesis.clone());
        home.save(&identity, None).expect("our own directory");
        (dir, Workspace::new(&home, identity, log.expect("a new log")))
    }

    #[test]
    fn a_certificate_that_the_hub_brings_must_be_a_newer_one_for_the_same_tags_by_a_signer() {
        let (_dir, workspace) = founded();
        let founder = workspace.identity();
        let Some(SignerKey::Open(signer)) = &founder.signer else { panic!("a founder") };
        let old = founder.noise.presented.certificate.object();
        let brought = |by: &SigningKey, certificate: Certificate| {
            workspace.renew(&Blob(by.sign(&certificate).encode())).is_ok()
        };
        let next = Certificate { serial: 2, ..old.clone() };
        let other = SigningKey::generate(&mut random::rng());
        assert!(!brought(signer, old.clone()), "the one it has");
        assert!(!brought(signer, Certificate { attrs: [9; 32], ..next.clone() }), "other tags");
        assert!(!brought(&other, next.clone()), "not signed by its issuer");
        let by_other = Certificate { issuer: Issuer::Signer(other.public()), ..next.clone() };
        assert!(!brought(&other, by_other), "by no signer");
        let anothers = Certificate { identity_key: other.public(), ..next.clone() };
        assert!(!brought(signer, anothers), "for another agent");
        assert!(brought(signer, next.clone()));
        assert_eq!(workspace.identity().noise.presented.certificate.object(), &next);
        assert!(!brought(signer, old.clone()), "the one before");
    }

    #[test]
    fn records_of_the_epoch_before_count_for_a_day() {
        let (_dir, workspace) = founded();
        let since = |ago| {
            let begun = Instant::now().checked_sub(ago).expect("the clock reaches back");
            *workspace.epoch_since.lock().expect("nobody panicked") = (7, begun);
        };
        let accepted = || [5, 6, 7, 8].map(|number| workspace.accepts_epoch(number));
        since(OLD_EPOCH.saturating_sub(Duration::from_secs(60)));
        assert_eq!(accepted(), [false, true, true, false]);
        since(OLD_EPOCH);
        assert_eq!(accepted(), [false, false, true, false]);
    }

    #[test]
    fn beats_are_signed_by_who_they_are_of_and_ones_own_is_none() {
        let founder = identity();
        let (signing, agent) = joined(&founder, CredentialKind::Invite);
        let beat = |agent_id: AgentId, by: &SigningKey| {
            by.sign(&Beat {
                workspace_id: founder.workspace_id(),
                agent_id,
                head: founder.trust.head(),
                time: clock::now(),
            })
        };
        let presented = Presented::from_blobs(&agent.presented).expect("sound");
        let holds = |beat: &Signed<Beat>, presented: &Presented| {
            verify_beat(&founder, beat, presented.clone()).is_some()
        };
        assert!(holds(&beat(agent.agent_id, &signing), &presented));
        assert!(!holds(&beat(agent.agent_id, &founder.signing), &presented));
        let (other, _) = joined(&founder, CredentialKind::Invite);
        assert!(!holds(&beat(agent.agent_id, &other), &presented));
        let own = &founder.noise.presented;
        assert!(!holds(&beat(founder.agent_id, &founder.signing), own));
    }

    #[test]
    fn guests_are_no_witnesses() {
        let founder = identity();
        for (kind, expected) in [(CredentialKind::Invite, true), (CredentialKind::Share, false)] {
            let (signing, agent) = joined(&founder, kind);
            let beat = signing.sign(&Beat {
                workspace_id: founder.workspace_id(),
                agent_id: agent.agent_id,
                head: founder.trust.head(),
                time: clock::now(),
            });
            let presented = Presented::from_blobs(&agent.presented).expect("sound");
            assert_eq!(verify_beat(&founder, &beat, presented).is_some(), expected);
        }
    }
}

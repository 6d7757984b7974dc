//! What an enrolled agent knows of itself: one version at a time, shared by whoever works with it.

use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

use connect_crypto::{
    custody::{Cost, CustodyError, Passphrase, SealedKey},
    epoch::{EpochSecrets, ShareSecret},
    invite::HubAddress,
    keys::{SigningKey, StaticKeypair, WrapKeypair},
    names::NameKeys,
};
use connect_spec::{
    ids::{AgentId, CredentialId, Label, WorkspaceId},
    keys::IdentityKey,
    objects::{AgentRole, Attributes, Certificate, Genesis, Issuer, NoiseKey, UnixTime},
    signed::Signed,
    trust::{Presented, TrustState},
};

use crate::{
    error::{Error, ErrorKind, Result},
    io::tls::HubCa,
    random,
};

/// A static key answers first messages for so long after its rotation: they come from reachers that
/// looked the service up before.
pub(crate) const KEPT_AFTER_ROTATION: Duration = Duration::from_secs(24 * 3600);

/// Everything that an enrolled agent knows of itself, at one moment.
///
/// It changes while the agent runs: whoever begins an operation takes a snapshot and ends with the same
/// one. Clones share their secrets, which are wiped when the last one is dropped. Holds every secret of
/// the agent; its Debug text shows none.
#[derive(Clone)]
pub struct Identity {
    pub(crate) hub: HubAddress,
    /// Who signs the hub's certificate, if not an authority that the system trusts.
    pub(crate) hub_ca: Option<HubCa>,
    pub(crate) label: Label,
    pub(crate) agent_id: AgentId,
    pub(crate) signing: Arc<SigningKey>,
    pub(crate) wrap: Arc<WrapKeypair>,
    pub(crate) noise: Arc<NoiseIdentity>,
    pub(crate) retired_noise: Option<RetiredNoise>,
    pub(crate) epochs: Arc<Epochs>,
    pub(crate) attrs: Arc<Attributes>,
    pub(crate) genesis: Arc<Signed<Genesis>>,
    pub(crate) trust: Arc<TrustState>,
    pub(crate) signer: Option<SignerKey>,
    /// What the giver of its share calls that, for a guest.
    pub(crate) share_label: Option<Label>,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("agent_id", &self.agent_id)
            .field("label", &self.label)
            .finish_non_exhaustive()
    }
}

impl Identity {
    /// What people call the agent.
    #[must_use]
    pub fn label(&self) -> &Label {
        &self.label
    }

    /// The agent's id.
    #[must_use]
    pub fn agent_id(&self) -> AgentId {
        self.agent_id
    }

    /// The address of its hub, without a pin.
    #[must_use]
    pub fn hub(&self) -> &str {
        &self.hub.url
    }

    /// The workspace that the agent belongs to.
    #[must_use]
    pub fn workspace_id(&self) -> WorkspaceId {
        self.trust.workspace_id()
    }

    /// The share by which this agent is a guest; none for a member.
    #[must_use]
    pub fn share_id(&self) -> Option<CredentialId> {
        let presented = &self.noise.presented;
        let is_guest = presented.certificate.object().role == AgentRole::Guest;
        presented.credential.as_ref().filter(|_| is_guest).map(|share| share.object().id())
    }

    /// Until when the share of a guest counts; 0 for a member.
    #[must_use]
    pub fn share_end(&self) -> UnixTime {
        let share = self.noise.presented.credential.as_ref().filter(|_| self.share_id().is_some());
        share.map_or(0, |share| share.object().certs_end)
    }

    /// What people call the share of a guest.
    #[must_use]
    pub fn share_name(&self) -> String {
        let id = || self.share_id().map(|id| id.to_string()).unwrap_or_default();
        self.share_label.as_ref().map_or_else(id, ToString::to_string)
    }

    /// Whether this is a guest by the share of that label or id.
    #[must_use]
    pub fn is_share(&self, wanted: &str) -> bool {
        self.share_id().is_some_and(|id| id.to_string() == wanted || self.share_name() == wanted)
    }

    /// What a member and the guests of a share have in common, in place of an epoch.
    pub(crate) fn share_epoch(&self, share: &CredentialId) -> Epoch {
        Epoch::of_share(&ShareSecret::derive(&self.epochs.current().secrets.realm, share))
    }

    /// The key by which this agent is a signer; `passphrase` is asked for only if nothing else helps.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] when it is none; [`ErrorKind::Other`] when the passphrase is wrong; that of
    /// `passphrase`.
    pub fn signing_key(
        &self,
        passphrase: impl FnOnce() -> Result<Passphrase>,
    ) -> Result<Arc<SigningKey>> {
        let is_signer = |key: &Arc<SigningKey>| self.trust.is_signer(&key.public());
        let open = match &self.signer {
            Some(SignerKey::Open(key)) => Some(key.clone()),
            Some(SignerKey::Locked(_)) | None => None,
        };
        if let Some(key) = open.into_iter().chain([self.signing.clone()]).find(is_signer) {
            return Ok(key);
        }
        let unlocked = match &self.signer {
            Some(SignerKey::Locked(_)) => Some(self.unlock_signer(passphrase)?),
            Some(SignerKey::Open(_)) | None => None,
        };
        unlocked.filter(is_signer).ok_or_else(|| {
            Error::new(ErrorKind::Refused, "this agent is no signer of the workspace").hint(
                "run this on a machine of a signer, such as the one that ran `connect init`; an \
                 owner can add this one: `connect trust add-signer AGENT`",
            )
        })
    }

    /// The keys by which this agent may be a signer: that of a founder is known by its certificate.
    pub(crate) fn own_signer_keys(&self) -> impl Iterator<Item = IdentityKey> {
        let certificate = self.noise.presented.certificate.object();
        let founder = match certificate.issuer {
            Issuer::Signer(key) if certificate.serial == 1 => Some(key),
            Issuer::Signer(_) | Issuer::Credential(_) => None,
        };
        let open = match &self.signer {
            Some(SignerKey::Open(key)) => Some(key.public()),
            Some(SignerKey::Locked(_)) | None => None,
        };
        founder.into_iter().chain(open).chain([self.signing.public()])
    }

    /// This agent with a certificate that a signer made for it.
    pub(crate) fn with_certificate(&self, certificate: Signed<Certificate>) -> Self {
        let certify = |old: &NoiseIdentity| {
            let static_keypair = StaticKeypair::from_secret(old.static_keypair.secret().clone());
            let certificate = certificate.clone();
            let presented = Presented { certificate, credential: None, ..old.presented.clone() };
            Arc::new(NoiseIdentity { static_keypair, presented, made: old.made })
        };
        let retired = self
            .retired_noise
            .as_ref()
            .map(|retired| RetiredNoise { noise: certify(&retired.noise), until: retired.until });
        Self { noise: certify(&self.noise), retired_noise: retired, ..self.clone() }
    }

    /// Opens the signer key of this home; `passphrase` is asked for only if it is locked.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] when this home holds no signer key; [`ErrorKind::Other`] when the passphrase
    /// is wrong; that of `passphrase`.
    pub fn unlock_signer(
        &self,
        passphrase: impl FnOnce() -> Result<Passphrase>,
    ) -> Result<Arc<SigningKey>> {
        match self.signer()? {
            SignerKey::Open(key) => Ok(key.clone()),
            SignerKey::Locked(sealed) => {
                let key = sealed.open(&self.workspace_id(), &passphrase()?).map_err(custody)?;
                Ok(Arc::new(key))
            }
        }
    }

    /// Whether the signer key needs a passphrase.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] when this home holds no signer key.
    pub fn signer_is_locked(&self) -> Result<bool> {
        self.signer().map(|signer| matches!(signer, SignerKey::Locked(_)))
    }

    fn signer(&self) -> Result<&SignerKey> {
        self.signer.as_ref().ok_or_else(|| {
            Error::new(
                ErrorKind::Refused,
                "this agent holds no signer key, so it cannot sign for the workspace",
            )
            .hint("run this on the machine that ran `connect init`")
        })
    }

    /// This agent with a new static key; the one that it had is retired.
    pub(crate) fn rotated(&self, now: UnixTime) -> Self {
        let static_keypair = StaticKeypair::generate(&mut random::rng());
        let old = &self.noise.presented;
        let noise_key = self.signing.sign(&NoiseKey {
            counter: self.noise.counter().saturating_add(1),
            static_key: static_keypair.public(),
            ..old.noise_key.object().clone()
        });
        let presented = Presented { noise_key, ..old.clone() };
        Self {
            noise: Arc::new(NoiseIdentity { static_keypair, presented, made: now }),
            retired_noise: Some(RetiredNoise {
                noise: self.noise.clone(),
                until: now.saturating_add(KEPT_AFTER_ROTATION.as_secs()),
            }),
            ..self.clone()
        }
    }

    /// The static keys that answer a first message, the one to try first before the other.
    pub(crate) fn answering(&self, now: UnixTime) -> impl Iterator<Item = &Arc<NoiseIdentity>> {
        let retired = self.retired_noise.iter().filter(move |retired| now < retired.until);
        [&self.noise].into_iter().chain(retired.map(|retired| &retired.noise))
    }
}

/// A signer's key as this home holds it.
#[derive(Debug, Clone)]
pub(crate) enum SignerKey {
    /// As it is.
    Open(Arc<SigningKey>),
    /// Under a passphrase.
    Locked(Arc<SealedKey>),
}

impl SignerKey {
    /// Puts a key under a passphrase.
    pub(crate) fn lock(
        key: &SigningKey,
        workspace: &WorkspaceId,
        passphrase: &Passphrase,
    ) -> Result<Self> {
        SealedKey::seal(key, workspace, passphrase, Cost::DEFAULT, &mut random::rng())
            .map(|sealed| Self::Locked(Arc::new(sealed)))
            .map_err(custody)
    }
}

fn custody(error: CustodyError) -> Error {
    match error {
        CustodyError::TooShort | CustodyError::TooLong => Error::new(ErrorKind::Usage, error),
        CustodyError::Open => Error::new(ErrorKind::Other, error)
            .hint("if it is not, `signer.key` was changed or is that of another workspace"),
        CustodyError::Malformed | CustodyError::Cost => {
            Error::new(ErrorKind::TrustViolation, format_args!("`signer.key`: {error}"))
                .hint("restore the file from a backup")
        }
    }
}

/// A Noise static key, and what shows that it is this agent's.
#[derive(Debug)]
pub(crate) struct NoiseIdentity {
    pub(crate) static_keypair: StaticKeypair,
    /// Its NoiseKey is that of `static_keypair`.
    pub(crate) presented: Presented,
    /// When the key was made; 0 when that is not known.
    pub(crate) made: UnixTime,
}

impl NoiseIdentity {
    /// The counter of the NoiseKey.
    pub(crate) fn counter(&self) -> u64 {
        self.presented.noise_key.object().counter
    }
}

/// A static key that was rotated away.
#[derive(Debug, Clone)]
pub(crate) struct RetiredNoise {
    pub(crate) noise: Arc<NoiseIdentity>,
    /// It answers nobody from then on, and is forgotten.
    pub(crate) until: UnixTime,
}

/// The secrets of one epoch, and the keys that hide names in it.
#[derive(Debug)]
pub(crate) struct Epoch {
    pub(crate) number: u32,
    pub(crate) secrets: EpochSecrets,
    pub(crate) names: NameKeys,
}

impl Epoch {
    /// The epoch of this number.
    fn new(number: u32, secrets: EpochSecrets) -> Self {
        let names = NameKeys::derive(&secrets.names);
        Self { number, secrets, names }
    }

    /// What takes the place of an epoch in a share: it has number 0 and no successor.
    pub(crate) fn of_share(secret: &ShareSecret) -> Self {
        Self::new(0, secret.secrets())
    }
}

/// The epochs whose secrets the agent holds: always one, the newest of which is current. A guest has that
/// of its share.
#[derive(Debug, Clone)]
pub(crate) struct Epochs {
    current: Arc<Epoch>,
    older: BTreeMap<u32, Arc<Epoch>>,
}

impl Epochs {
    /// The epochs of these numbers; `None` without any.
    pub(crate) fn new(secrets: impl IntoIterator<Item = (u32, EpochSecrets)>) -> Option<Self> {
        let mut older: BTreeMap<_, _> = secrets
            .into_iter()
            .map(|(number, secrets)| (number, Arc::new(Epoch::new(number, secrets))))
            .collect();
        let (_, current) = older.pop_last()?;
        Some(Self { current, older })
    }

    /// What a guest holds.
    pub(crate) fn of_share(secret: &ShareSecret) -> Self {
        Self { current: Arc::new(Epoch::of_share(secret)), older: BTreeMap::new() }
    }

    /// A single epoch: what a new member holds.
    pub(crate) fn only(number: u32, secrets: EpochSecrets) -> Self {
        Self::new([(number, secrets)]).expect("one epoch is not none")
    }

    /// The epoch under which this agent seals.
    pub(crate) fn current(&self) -> &Epoch {
        &self.current
    }

    /// The newest epoch before the current one, if it is held.
    pub(crate) fn previous(&self) -> Option<&Epoch> {
        self.older.values().next_back().map(Arc::as_ref)
    }

    /// The epoch of this number, if it is held.
    pub(crate) fn get(&self, number: u32) -> Option<&Epoch> {
        self.all().find(|epoch| epoch.number == number)
    }

    /// Every epoch that is held, by number.
    pub(crate) fn all(&self) -> impl Iterator<Item = &Epoch> {
        self.older.values().chain([&self.current]).map(Arc::as_ref)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::fs;

    use connect_crypto::founding::Founding;
    use connect_spec::control::PresentedBlobs;
    use connect_spec::objects::SUITE_1;

    use super::*;
    use crate::home::Home;

    /// A founder.
    pub(crate) fn identity() -> Identity {
        let mut rng = random::rng();
        let Founding { genesis, signer, epoch, .. } = Founding::create(&mut rng);
        let trust = TrustState::from_genesis(WorkspaceId(genesis.hash()), &genesis).expect("sound");
        let workspace_id = trust.workspace_id();
        let signing = SigningKey::generate(&mut rng);
        let wrap = WrapKeypair::generate(&mut rng);
        let static_keypair = StaticKeypair::generate(&mut rng);
        let attrs = Attributes::new([0; 16], Vec::new()).expect("no tag");
        let agent_id = AgentId::of(&workspace_id, &signing.public());
        let certificate = signer.sign(&Certificate {
            workspace_id,
            identity_key: signing.public(),
            role: AgentRole::Member,
            attrs: attrs.hash(),
            serial: 1,
            not_after: None,
            issuer: Issuer::Signer(signer.public()),
            services: None,
        });
        let noise_key = signing.sign(&NoiseKey {
            workspace_id,
            agent_id,
            suite: SUITE_1,
            counter: 1,
            static_key: static_keypair.public(),
            wrap_key_hash: wrap.public().hash(),
        });
        let presented = Presented { certificate, credential: None, noise_key };
        Identity {
            hub: "http://127.0.0.1:7420".parse().expect("a hub"),
            hub_ca: None,
            label: "agent".parse().expect("a label"),
            agent_id,
            signing: Arc::new(signing),
            wrap: Arc::new(wrap),
            noise: Arc::new(NoiseIdentity { static_keypair, presented, made: 0 }),
            retired_noise: None,
            epochs: Arc::new(Epochs::only(0, epoch)),
            attrs: Arc::new(attrs),
            genesis: Arc::new(genesis),
            trust: Arc::new(trust),
            signer: Some(SignerKey::Open(Arc::new(signer))),
            share_label: None,
        }
    }

    #[test]
    fn certificate_and_rotation_of_two_processes_do_not_undo_each_other() {
        let dir = tempfile::tempdir().expect("a directory");
        let home = Home::at(dir.path().join("home"));
        let identity = identity();
        home.save(&identity, None).expect("our own directory");
        let certificate = identity.noise.presented.certificate.object().clone();
        let certificate = identity.signing.sign(&Certificate { serial: 2, ..certificate });
        // Each knows nothing of what the other does.
        let rotated = identity.rotated(1000);
        let certified = identity.with_certificate(certificate.clone());
        let expected = Presented { certificate, ..rotated.noise.presented.clone() };
        let check = || {
            let text = fs::read(home.dir().join("membership.json")).expect("saved");
            let blobs: PresentedBlobs = serde_json::from_slice(&text).expect("JSON");
            assert_eq!(Presented::from_blobs(&blobs).expect("sound"), expected);
        };
        home.save_noise(&rotated).expect("saved");
        home.save_certificate(&certified).expect("saved");
        check();
        home.save(&identity, None).expect("saved");
        home.save_certificate(&certified).expect("saved");
        home.save_noise(&rotated).expect("saved");
        check();

        // A retired key presents what the current one does.
        let both = rotated.with_certificate(expected.certificate.clone());
        let shown: Vec<_> = both
            .answering(1000)
            .map(|noise| (noise.counter(), noise.presented.certificate.object().serial))
            .collect();
        assert_eq!(shown, [(2, 2), (1, 2)]);
    }

    /// Whether a secret is in a text, as digits or as a list of bytes.
    #[track_caller]
    fn check_absent(text: &str, secret: &[u8]) {
        let listed = format!("{:?}", &secret[..8]);
        assert!(!text.contains(listed.trim_matches(['[', ']'])), "{text}");
        assert!(!text.contains(&hex::encode(&secret[..8])), "{text}");
    }

    #[test]
    fn debug_text_shows_no_secret() {
        let identity = identity();
        let Some(SignerKey::Open(signer)) = identity.signer.clone() else {
            panic!("the founder's key is open");
        };
        let passphrase =
            Passphrase::new("correct horse".to_owned().into()).expect("it is long enough");
        let locked =
            SignerKey::lock(&signer, &identity.workspace_id(), &passphrase).expect("sealed");
        let identity = identity.rotated(1);
        let retired = identity.retired_noise.as_ref().expect("it was rotated");
        let texts = [
            format!("{identity:?} {identity:#?}"),
            format!("{:?} {:?}", identity.noise, retired),
            format!("{:?} {:?}", identity.epochs, identity.epochs.current()),
            format!("{:?} {locked:?} {passphrase:?}", identity.signer),
            format!("{:?} {:?}", identity.signing, identity.wrap),
        ];
        let epoch = identity.epochs.current().secrets.to_bytes();
        for text in &texts {
            check_absent(text, identity.signing.seed().as_slice());
            check_absent(text, identity.wrap.seed().as_slice());
            check_absent(text, identity.noise.static_keypair.secret().as_slice());
            check_absent(text, retired.noise.static_keypair.secret().as_slice());
            check_absent(text, signer.seed().as_slice());
            check_absent(text, &epoch[..32]);
            check_absent(text, &epoch[32..]);
            assert!(!text.contains("correct horse"), "{text}");
        }
        assert!(texts[2].contains("EpochSecrets(..)") && texts[3].contains("Passphrase(..)"));
    }

    #[test]
    fn retired_key_answers_until_its_time_is_over() {
        let identity = identity();
        assert_eq!(identity.answering(0).count(), 1);
        let rotated = identity.rotated(1000);
        let day = KEPT_AFTER_ROTATION.as_secs();
        let counters =
            |now| -> Vec<_> { rotated.answering(now).map(|noise| noise.counter()).collect() };
        assert_eq!(counters(1000 + day - 1), [2, 1]);
        assert_eq!(counters(1000 + day), [2]);
        let twice: Vec<_> =
            rotated.rotated(2000).answering(2000).map(|noise| noise.counter()).collect();
        assert_eq!(twice, [3, 2]);
    }

    #[test]
    fn newest_epoch_is_current_and_each_is_found_by_its_number() {
        let secrets = || EpochSecrets::generate(&mut random::rng());
        assert!(Epochs::new([]).is_none());
        let one = Epochs::only(3, secrets());
        assert_eq!(one.current().number, 3);
        assert!(one.previous().is_none() && one.get(0).is_none());

        let three = Epochs::new([(2, secrets()), (0, secrets()), (1, secrets())]).expect("three");
        assert_eq!(three.current().number, 2);
        assert_eq!(three.previous().map(|epoch| epoch.number), Some(1));
        assert!((0..3).all(|number| three.get(number).is_some_and(|epoch| epoch.number == number)));
        assert!(three.get(3).is_none());
    }
}

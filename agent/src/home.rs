//! What an agent keeps on disk, in one directory: secrets 0600 under a 0700 home, replaced atomically.
//!
//! `agent.key`, `epochs.key` and `signer.key` hold secrets and nothing else; `membership.json`, `hub-ca.pem` and
//! `trust/` are public; `state.json` and `ports.json` are what to restore. One home is one agent, by `agent.lock`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File, TryLockError},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
};

use connect_crypto::{
    custody::{Passphrase, SealedKey},
    epoch::{EpochSecrets, ShareSecret},
    invite::HubAddress,
    keys::{SigningKey, StaticKeypair, WrapKeypair},
};
use connect_spec::{
    audit::SeenHead,
    bytes::Blob,
    control::PresentedBlobs,
    hash::hash16,
    ids::{AgentId, CredentialId, Label, ServiceId, ServiceName, WorkspaceId},
    log::LogEntry,
    objects::{Attributes, NoiseKey, UnixTime},
    signed::Signed,
    trust::{Presented, TrustState},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use zeroize::Zeroizing;

use crate::{
    error::{Error, ErrorKind, Result},
    identity::{Epochs, Identity, NoiseIdentity, RetiredNoise, SignerKey},
    io::tls::HubCa,
    ports::Loopback,
    trust::{TrustLock, TrustLog},
};

/// Certificates of the authorities that may sign the hub's.
const HUB_CA: &str = "hub-ca.pem";
/// Longest path of a Unix socket that every system takes.
const MAX_SOCKET_PATH: usize = 100;
const SEEN_AUDIT: &str = "trust/audit.json";
/// The homes of shares that were joined from this one.
const SHARES: &str = "shares";

/// The directory of one agent.
#[derive(Debug, Clone)]
pub struct Home {
    dir: PathBuf,
}

/// Held while a process is the agent of a home.
#[derive(Debug)]
pub struct HomeLock {
    _file: File,
}

/// The public half of an enrolment, as `membership.json` holds it.
#[derive(Debug, Serialize, Deserialize)]
struct Membership {
    version: u32,
    hub: String,
    label: Label,
    workspace_id: WorkspaceId,
    salt: Blob,
    tags: Vec<String>,
    #[serde(flatten)]
    presented: PresentedBlobs,
    #[serde(default)]
    noise_key_made: UnixTime,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    retired_noise_key: Option<SavedRetired>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    share_label: Option<Label>,
}

/// A NoiseKey that was rotated away, and until when it answers.
#[derive(Debug, Serialize, Deserialize)]
struct SavedRetired {
    noise_key: Blob,
    until: UnixTime,
}

impl SavedRetired {
    fn of(retired: &RetiredNoise) -> Self {
        let noise_key = Blob(retired.noise.presented.noise_key.encode());
        Self { noise_key, until: retired.until }
    }
}

/// A service that the agent offers whenever it runs.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct SavedExpose {
    pub(crate) name: ServiceName,
    pub(crate) target: String,
    pub(crate) service_id: ServiceId,
    #[serde(default)]
    pub(crate) allow: Vec<String>,
    /// What is spoken there, where that was found out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) protocol: Option<String>,
}

/// A service that the agent reaches whenever it runs.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct SavedReach {
    pub(crate) name: ServiceName,
    #[serde(default)]
    pub(crate) port: Option<u16>,
    /// On this address, if one was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) address: Option<Loopback>,
}

/// What to restore when the agent starts, as `state.json` holds it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct State {
    #[serde(default)]
    pub(crate) exposes: Vec<SavedExpose>,
    #[serde(default)]
    pub(crate) reaches: Vec<SavedReach>,
    /// Services that the hub still lists, unless it was told by now that they are withdrawn.
    #[serde(default)]
    pub(crate) withdrawn: Vec<ServiceId>,
    /// Counter of the last sealed record of any kind that this agent published.
    #[serde(default)]
    pub(crate) record_counter: u32,
}

/// What the agent remembers of its peers, as `trust/peers.json` holds it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Peers {
    /// The agent that a name stood for when it was first reached.
    #[serde(default)]
    pub(crate) pins: BTreeMap<ServiceName, AgentId>,
    /// The highest NoiseKey counter seen of each agent, and the static key under it.
    #[serde(default)]
    pub(crate) noise_keys: BTreeMap<AgentId, SeenNoiseKey>,
    /// Who came by each share.
    #[serde(default)]
    pub(crate) guests: BTreeMap<CredentialId, BTreeSet<AgentId>>,
}

/// A NoiseKey as it was last seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SeenNoiseKey {
    pub(crate) counter: u64,
    pub(crate) static_key: connect_spec::keys::StaticPublicKey,
}

impl Home {
    /// The home that the environment names: `CONNECT_HOME`, else `~/.connect`.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] when neither variable is set.
    pub fn from_env() -> Result<Self> {
        if let Some(dir) = std::env::var_os("CONNECT_HOME").filter(|dir| !dir.is_empty()) {
            return Ok(Self::at(dir));
        }
        std::env::home_dir().map(|home| Self::at(home.join(".connect"))).ok_or_else(|| {
            Error::new(ErrorKind::Usage, "no home directory is known")
                .hint("set CONNECT_HOME to a directory of your own")
        })
    }

    /// The home in this directory, which need not exist yet.
    #[must_use]
    pub fn at(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    /// The home, inside this one, of the guest that its owner is by a share.
    #[must_use]
    pub fn of_share(&self, share: &CredentialId) -> Self {
        Self::at(self.path(SHARES).join(share.to_string()))
    }

    /// The homes of shares that are inside this one and enrolled, in the order of their ids.
    ///
    /// # Errors
    /// [`ErrorKind::Other`] when the directory cannot be read.
    pub fn shares(&self) -> Result<Vec<Self>> {
        let entries = match fs::read_dir(self.path(SHARES)) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error.into()),
        };
        let mut dirs =
            entries.map(|entry| entry.map(|entry| entry.path())).collect::<io::Result<Vec<_>>>()?;
        dirs.sort();
        Ok(dirs.into_iter().map(Self::at).filter(Self::is_enrolled).collect())
    }

    /// Forgets a share, named by its label or id, while no agent runs here.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] when none, or more than one, is called so; or the home cannot be written.
    pub fn leave(&self, wanted: &str) -> Result<()> {
        let mut found = Vec::new();
        for share in self.shares()? {
            if share.load()?.is_share(wanted) {
                found.push(share);
            }
        }
        self.forget_share(&one_share(found, wanted)?)
    }

    /// Removes the home of a share with everything in it.
    ///
    /// # Errors
    /// [`ErrorKind::Other`] when it cannot be removed.
    pub(crate) fn forget_share(&self, share: &Self) -> Result<()> {
        fs::remove_dir_all(share.dir()).map_err(|error| self.unwritable(&error))
    }

    /// The directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether an agent lives here.
    #[must_use]
    pub fn is_enrolled(&self) -> bool {
        self.path("membership.json").exists()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Creates the directory, 0700, if it is not there.
    pub(crate) fn create(&self) -> Result<()> {
        for dir in [&self.dir, &self.path("trust"), &self.path("evidence")] {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(dir)
                .and_then(|()| {
                    // A home on a file system that is read only is private already.
                    if fs::metadata(dir)?.mode() & 0o777 == 0o700 {
                        return Ok(());
                    }
                    fs::set_permissions(dir, fs::Permissions::from_mode(0o700))
                })
                .map_err(|error| self.unwritable(&error))?;
        }
        Ok(())
    }

    fn unwritable(&self, error: &io::Error) -> Error {
        let told = Error::new(
            ErrorKind::Other,
            format_args!("cannot write to `{}`: {error}", self.dir.display()),
        );
        let kind = error.kind();
        if matches!(
            kind,
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge
        ) {
            return told.hint("make room there; what was saved before is unharmed");
        }
        told.hint("make the directory yours and writable, or set CONNECT_HOME to another one")
    }

    /// Takes the lock of this home; `None` when another process holds it.
    ///
    /// # Errors
    /// [`ErrorKind::Other`] when the home cannot be written.
    pub fn try_lock(&self) -> Result<Option<HomeLock>> {
        let file = self.open_lock("agent.lock")?;
        match file.try_lock() {
            Ok(()) => Ok(Some(HomeLock { _file: file })),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(self.unwritable(&error)),
        }
    }

    /// Where the running agent listens for commands.
    ///
    /// A socket's path is short: a home whose own is too long gets one in `$XDG_RUNTIME_DIR`, or in a
    /// directory of this user's under `/tmp`, named by a hash of the home.
    ///
    /// # Errors
    /// [`ErrorKind::Other`] when that directory belongs to someone else.
    pub fn socket_path(&self) -> Result<PathBuf> {
        let own = self.path("agent.sock");
        if own.as_os_str().len() <= MAX_SOCKET_PATH {
            return Ok(own);
        }
        let absolute = std::path::absolute(&self.dir)?;
        let name = format!(
            "agent-{}.sock",
            hex::encode(&hash16("home", &[absolute.as_os_str().as_encoded_bytes()])[..8])
        );
        let uid = nix::unistd::geteuid();
        let runtime = std::env::var_os("XDG_RUNTIME_DIR")
            .map(PathBuf::from)
            .filter(|dir| dir.as_os_str().len() + 1 + name.len() <= MAX_SOCKET_PATH);
        let dir = match runtime {
            Some(dir) => dir,
            None => {
                let dir = PathBuf::from(format!("/tmp/connect-{uid}"));
                fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir)?;
                dir
            }
        };
        let metadata = fs::symlink_metadata(&dir)?;
        let private = metadata.is_dir() && metadata.mode().trailing_zeros() >= 6;
        if !private || metadata.uid() != uid.as_raw() {
            return Err(Error::new(
                ErrorKind::Other,
                format_args!("`{}` is not a private directory of this user", dir.display()),
            )
            .hint("set CONNECT_HOME to a shorter path"));
        }
        Ok(dir.join(name))
    }

    /// Reads the agent's identity.
    ///
    /// # Errors
    /// [`ErrorKind::NotEnrolled`] when there is none; [`ErrorKind::TrustViolation`] when what is on
    /// disk does not hold together.
    pub fn load(&self) -> Result<Identity> {
        self.load_with_log().map(|(identity, _)| identity)
    }

    /// Whether an agent lives here, and if not, why that cannot be said.
    ///
    /// # Errors
    /// [`ErrorKind::NotEnrolled`] when there is none; [`ErrorKind::Other`] when this user may not look.
    pub(crate) fn check_enrolled(&self) -> Result<()> {
        match fs::metadata(self.path("membership.json")) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                Err(unreadable(&self.dir, &error))
            }
            Err(_) => Err(Error::new(
                ErrorKind::NotEnrolled,
                format_args!("no agent lives in `{}`", self.dir.display()),
            )
            .hint("run `connect init --hub URL` to begin a workspace, or `connect join CODE`")),
            Ok(_) => Ok(()),
        }
    }

    /// As [`Home::load`], with the trust log.
    pub(crate) fn load_with_log(&self) -> Result<(Identity, TrustLog)> {
        self.check_enrolled()?;
        let membership: Membership = self.read_json("membership.json")?;
        let keys = SecretFile::read(&self.path("agent.key"))?;
        let damaged = |what: &str| self.damaged(what);
        let signing = SigningKey::from_seed(keys.fixed("identity")?);
        let log = TrustLog::load(self, membership.workspace_id)?;
        let trust = log.state().clone();
        let presented =
            Presented::from_blobs(&membership.presented).map_err(|_| damaged("membership.json"))?;
        let attrs = Attributes::new(
            membership.salt.0.try_into().map_err(|_| damaged("membership.json"))?,
            membership.tags,
        )
        .map_err(|_| damaged("membership.json"))?;
        let agent_id = AgentId::of(&membership.workspace_id, &signing.public());
        if presented.certificate.object().agent_id() != agent_id {
            return Err(damaged("agent.key"));
        }
        let epochs = self.load_epochs(&trust)?.ok_or_else(|| damaged("epochs.key"))?;
        let static_keypair = |noise_key: &Signed<NoiseKey>| {
            let noise_key = noise_key.object();
            let keypair = StaticKeypair::from_secret(keys.fixed(&static_line(noise_key.counter))?);
            let bound = keypair.public() == noise_key.static_key;
            if bound { Ok(keypair) } else { Err(damaged("agent.key")) }
        };
        let retired_noise = match membership.retired_noise_key {
            Some(retired) => {
                let noise_key =
                    Signed::decode(&retired.noise_key.0).map_err(|_| damaged("membership.json"))?;
                // The secret goes first when a key is forgotten: a crash may have come between.
                static_keypair(&noise_key).ok().map(|static_keypair| {
                    let presented = Presented { noise_key, ..presented.clone() };
                    let noise = NoiseIdentity { static_keypair, presented, made: 0 };
                    RetiredNoise { noise: Arc::new(noise), until: retired.until }
                })
            }
            None => None,
        };
        let noise = NoiseIdentity {
            static_keypair: static_keypair(&presented.noise_key)?,
            presented,
            made: membership.noise_key_made,
        };
        let signer = if self.path("signer.key").exists() {
            let keys = SecretFile::read(&self.path("signer.key"))?;
            Some(match keys.line("sealed") {
                Some(digits) => {
                    let sealed = hex::decode(digits).ok();
                    let sealed = sealed.and_then(|bytes| SealedKey::from_bytes(&bytes).ok());
                    SignerKey::Locked(Arc::new(sealed.ok_or_else(|| damaged("signer.key"))?))
                }
                None => SignerKey::Open(Arc::new(SigningKey::from_seed(keys.fixed("signer")?))),
            })
        } else {
            None
        };
        let hub_ca = match fs::read(self.path(HUB_CA)) {
            Ok(pem) => Some(HubCa::from_pem(&pem).map_err(|_| damaged(HUB_CA))?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(_) => return Err(damaged(HUB_CA)),
        };
        let identity = Identity {
            hub_ca,
            hub: HubAddress::from_str(&membership.hub).map_err(|_| damaged("membership.json"))?,
            label: membership.label,
            agent_id,
            signing: Arc::new(signing),
            wrap: Arc::new(WrapKeypair::from_seed(keys.fixed("wrap")?)),
            noise: Arc::new(noise),
            retired_noise,
            epochs: Arc::new(epochs),
            attrs: Arc::new(attrs),
            genesis: log.genesis().clone(),
            trust,
            signer,
            share_label: membership.share_label,
        };
        Ok((identity, log))
    }

    pub(crate) fn damaged(&self, file: &str) -> Error {
        damaged(&self.path(file))
    }

    /// Writes a new identity, of a guest with the secret of its share; the file that makes the home enrolled
    /// comes last.
    pub(crate) fn save(&self, identity: &Identity, share: Option<&ShareSecret>) -> Result<()> {
        self.create()?;
        self.save_keys(identity)?;
        if let Some(signer) = &identity.signer {
            self.save_signer(signer)?;
        }
        if let Some(ca) = &identity.hub_ca {
            self.write(HUB_CA, ca.pem())?;
        }
        match share {
            Some(secret) => self.save_share(secret)?,
            None => {
                for epoch in identity.epochs.all() {
                    self.save_epoch(epoch.number, &epoch.secrets)?;
                }
            }
        }
        self.write_json(
            "membership.json",
            &Membership {
                version: 1,
                hub: identity.hub.to_string(),
                label: identity.label.clone(),
                workspace_id: identity.workspace_id(),
                salt: Blob(identity.attrs.salt.to_vec()),
                tags: identity.attrs.tags.clone(),
                presented: identity.noise.presented.to_blobs(),
                noise_key_made: identity.noise.made,
                retired_noise_key: identity.retired_noise.as_ref().map(SavedRetired::of),
                share_label: identity.share_label.clone(),
            },
        )
    }

    /// Writes the secret of a guest's share.
    fn save_share(&self, secret: &ShareSecret) -> Result<()> {
        let mut keys = SecretFile::default();
        keys.put("share", secret.as_bytes().as_slice());
        self.write("epochs.key", keys.text.as_bytes())
    }

    /// Writes the key of a founder.
    fn save_signer(&self, signer: &SignerKey) -> Result<()> {
        let mut keys = SecretFile::default();
        match signer {
            SignerKey::Open(key) => keys.put("signer", key.seed().as_slice()),
            SignerKey::Locked(sealed) => keys.put("sealed", sealed.as_bytes()),
        }
        self.write("signer.key", keys.text.as_bytes())
    }

    /// Puts the signer key of this home under a passphrase, or takes its passphrase away.
    ///
    /// # Errors
    /// The home cannot be written; the key in it stays as it was.
    pub fn set_passphrase(
        &self,
        identity: &Identity,
        signer: &Arc<SigningKey>,
        passphrase: Option<&Passphrase>,
    ) -> Result<()> {
        let signer = match passphrase {
            Some(passphrase) => SignerKey::lock(signer, &identity.workspace_id(), passphrase)?,
            None => SignerKey::Open(signer.clone()),
        };
        self.save_signer(&signer)
    }

    fn save_keys(&self, identity: &Identity) -> Result<()> {
        let mut keys = SecretFile::default();
        keys.put("identity", identity.signing.seed().as_slice());
        let retired = identity.retired_noise.as_ref().map(|retired| &retired.noise);
        for noise in retired.into_iter().chain([&identity.noise]) {
            let name = static_line(noise.counter());
            keys.put(&name, noise.static_keypair.secret().as_slice());
        }
        keys.put("wrap", identity.wrap.seed().as_slice());
        self.write("agent.key", keys.text.as_bytes())
    }

    /// The epochs that are held here and that the log confirms; a signer also keeps one that it has not
    /// brought into the log yet. For a guest, what its share has in their place.
    pub(crate) fn load_epochs(&self, trust: &TrustState) -> Result<Option<Epochs>> {
        let keys = SecretFile::read(&self.path("epochs.key"))?;
        if keys.line("share").is_some() {
            let secret = ShareSecret::from_bytes(keys.fixed("share")?);
            return Ok(Some(Epochs::of_share(&secret)));
        }
        let held = keys.numbered("epoch-")?.into_iter();
        let held = held.map(|(number, bytes)| (number, EpochSecrets::from_bytes(bytes)));
        Ok(Epochs::new(
            held.filter(|(number, secrets)| trust.epoch_commit(*number) == Some(&secrets.commit())),
        ))
    }

    /// Adds the secrets of an epoch, in place of others of the same number; the oldest go.
    pub(crate) fn save_epoch(&self, number: u32, secrets: &EpochSecrets) -> Result<()> {
        let _lock = self.lock_trust()?;
        let mut held: BTreeMap<u32, _> = if self.path("epochs.key").exists() {
            SecretFile::read(&self.path("epochs.key"))?.numbered("epoch-")?.into_iter().collect()
        } else {
            BTreeMap::new()
        };
        held.insert(number, secrets.to_bytes());
        while held.len() > KEPT_EPOCHS {
            held.pop_first();
        }
        let mut keys = SecretFile::default();
        for (number, secrets) in &held {
            keys.put(&format!("epoch-{number}"), secrets.as_slice());
        }
        self.write("epochs.key", keys.text.as_bytes())
    }

    /// Waits for the right to sign an entry: two processes of one home must not sign for one place.
    pub(crate) fn lock_signing(&self) -> Result<TrustLock> {
        self.lock_file("trust/signing")
    }

    /// Remembers an entry that is signed and not yet in the log, or forgets it.
    pub(crate) fn save_pending(&self, entry: Option<&LogEntry>) -> Result<()> {
        match entry {
            Some(entry) => self.write("trust/pending", &entry.encode()),
            None => match fs::remove_file(self.path("trust/pending")) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    Err(self.unwritable(&error))
                }
                Ok(()) | Err(_) => Ok(()),
            },
        }
    }

    /// The entry that was signed and perhaps not sent.
    pub(crate) fn load_pending(&self) -> Result<Option<LogEntry>> {
        if !self.path("trust/pending").exists() {
            return Ok(None);
        }
        let entry = LogEntry::decode(&self.read("trust/pending")?);
        entry.map(Some).map_err(|_| self.damaged("trust/pending"))
    }

    /// Waits for the right to change what several processes of this home share: the trust log, the
    /// epochs and the membership.
    pub(crate) fn lock_trust(&self) -> Result<TrustLock> {
        self.lock_file("trust/lock")
    }

    fn open_lock(&self, name: &str) -> Result<File> {
        self.create()?;
        fs::OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(self.path(name))
            .or_else(|error| {
                // What only reads needs the lock, too, and a file need not be writable to be locked.
                if error.kind() == io::ErrorKind::ReadOnlyFilesystem {
                    return File::open(self.path(name)).map_err(|_| error);
                }
                Err(error)
            })
            .map_err(|error| self.unwritable(&error))
    }

    pub(crate) fn lock_file(&self, name: &str) -> Result<TrustLock> {
        let file = self.open_lock(name)?;
        file.lock().map_err(|error| self.unwritable(&error))?;
        Ok(TrustLock::held_by(file))
    }

    /// Takes over a certificate that a signer made for this agent.
    ///
    /// The NoiseKey stays: another process of this home may have rotated it.
    pub(crate) fn save_certificate(&self, identity: &Identity) -> Result<()> {
        let _lock = self.lock_trust()?;
        let membership: Membership = self.read_json("membership.json")?;
        let noise_key = membership.presented.noise_key.clone();
        let presented = PresentedBlobs { noise_key, ..identity.noise.presented.to_blobs() };
        self.write_json("membership.json", &Membership { presented, ..membership })
    }

    /// Writes what a rotation changed, and nothing else: another process of this home may have taken over
    /// a certificate.
    ///
    /// The secrets come first: a crash in between leaves a secret that no NoiseKey names yet, or a
    /// retired NoiseKey without its secret, and both are passed over.
    pub(crate) fn save_noise(&self, identity: &Identity) -> Result<()> {
        let _lock = self.lock_trust()?;
        let membership: Membership = self.read_json("membership.json")?;
        self.save_keys(identity)?;
        let noise_key = Blob(identity.noise.presented.noise_key.encode());
        self.write_json(
            "membership.json",
            &Membership {
                presented: PresentedBlobs { noise_key, ..membership.presented },
                noise_key_made: identity.noise.made,
                retired_noise_key: identity.retired_noise.as_ref().map(SavedRetired::of),
                ..membership
            },
        )
    }

    /// Changes what people call the agent; it publishes the label when it next starts.
    ///
    /// # Errors
    /// As [`Home::load`]; or the home cannot be written.
    pub fn set_label(&self, label: &Label) -> Result<()> {
        self.load()?;
        let membership: Membership = self.read_json("membership.json")?;
        self.write_json("membership.json", &Membership { label: label.clone(), ..membership })
    }

    /// Takes back an enrolment that the hub refused.
    pub(crate) fn forget(&self) {
        for file in [
            "membership.json",
            "agent.key",
            "epochs.key",
            "signer.key",
            HUB_CA,
            "trust/genesis",
            "trust/head.json",
            "trust/log-0",
        ] {
            // What cannot be removed was not written, or is reported at the next start.
            let _ = fs::remove_file(self.path(file));
        }
    }

    pub(crate) fn load_state(&self) -> Result<State> {
        self.read_json_or_default("state.json").map_err(|error| {
            if error.kind != ErrorKind::TrustViolation {
                return error;
            }
            // Membership and keys are elsewhere.
            error.hint(
                "restore it from a backup, or move it away: what was exposed and reached is forgotten then, \
                 and nothing else",
            )
        })
    }

    pub(crate) fn save_state(&self, state: &State) -> Result<()> {
        self.write_json("state.json", state)
    }

    pub(crate) fn load_peers(&self) -> Result<Peers> {
        self.read_json_or_default("trust/peers.json")
    }

    pub(crate) fn save_peers(&self, peers: &Peers) -> Result<()> {
        self.write_json("trust/peers.json", peers)
    }

    /// Where the audit log was seen to end, at different times.
    pub(crate) fn load_seen_audit(&self) -> Result<Vec<SeenHead>> {
        self.read_json_or_default(SEEN_AUDIT)
    }

    pub(crate) fn save_seen_audit(&self, seen: &[SeenHead]) -> Result<()> {
        self.write_json(SEEN_AUDIT, &seen)
    }

    /// What is said of a file of this home that cannot be read.
    #[must_use]
    pub fn unreadable(&self, name: &str, error: &io::Error) -> Error {
        unreadable(&self.path(name), error)
    }

    pub(crate) fn read(&self, name: &str) -> Result<Vec<u8>> {
        fs::read(self.path(name)).map_err(|error| self.unreadable(name, &error))
    }

    pub(crate) fn read_json<T: DeserializeOwned>(&self, name: &str) -> Result<T> {
        serde_json::from_slice(&self.read(name)?).map_err(|_| self.damaged(name))
    }

    fn read_json_or_default<T: DeserializeOwned + Default>(&self, name: &str) -> Result<T> {
        self.read_json_if_there(name).map(Option::unwrap_or_default)
    }

    pub(crate) fn read_json_if_there<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>> {
        if self.path(name).exists() { self.read_json(name).map(Some) } else { Ok(None) }
    }

    pub(crate) fn write_json<T: Serialize>(&self, name: &str, value: &T) -> Result<()> {
        let mut text = serde_json::to_vec_pretty(value).expect("plain data becomes JSON");
        text.push(b'\n');
        self.write(name, &text)
    }

    /// Replaces a file atomically: a reader, or a crash, sees the old one or the new one.
    pub(crate) fn write(&self, name: &str, content: &[u8]) -> Result<()> {
        let path = self.path(name);
        let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
        let written = (|| {
            let mut file = fs::OpenOptions::new()
                .create(true)
                .truncate(true)
                .write(true)
                .mode(0o600)
                .open(&temporary)?;
            file.write_all(content)?;
            file.sync_all()?;
            fs::rename(&temporary, &path)?;
            File::open(path.parent().unwrap_or(&self.dir))?.sync_all()
        })();
        written.map_err(|error| {
            // Where there was no room for the file there is none for its beginning.
            let _ = fs::remove_file(&temporary);
            self.unwritable(&error)
        })
    }
}

fn unreadable(path: &Path, error: &io::Error) -> Error {
    Error::new(ErrorKind::Other, format_args!("cannot read `{}`: {error}", path.display()))
        .hint("is it yours? CONNECT_HOME names the home to use")
}

/// A file of this path does not say what it should.
fn damaged(path: &Path) -> Error {
    Error::new(
        ErrorKind::TrustViolation,
        format_args!("`{}` is damaged or was changed", path.display()),
    )
    .hint("restore the directory from a backup, or join again from an empty one")
}

/// A file of secrets: a line `name hex` each. Wiped from memory when dropped.
#[derive(Default)]
struct SecretFile {
    /// Where it was read.
    path: PathBuf,
    text: Zeroizing<String>,
}

/// Longest content of a secret file. Its buffer is reserved at once, so that
/// growing leaves no copy.
const SECRET_FILE_BYTES: usize = 4096;
/// Epochs whose secrets are kept: the current one, the one before, and two that were not needed lately.
const KEPT_EPOCHS: usize = 4;

impl SecretFile {
    fn put(&mut self, name: &str, secret: &[u8]) {
        let missing = SECRET_FILE_BYTES.saturating_sub(self.text.len());
        self.text.reserve(missing);
        self.text.push_str(name);
        self.text.push(' ');
        for byte in secret {
            for nibble in [byte >> 4, byte & 15] {
                self.text
                    .push(char::from_digit(nibble.into(), 16).expect("a nibble is a hex digit"));
            }
        }
        self.text.push('\n');
    }

    fn read(path: &Path) -> Result<Self> {
        use io::Read;
        let open = || {
            let file = File::open(path)?;
            let mut text = Zeroizing::new(String::with_capacity(SECRET_FILE_BYTES));
            file.take(SECRET_FILE_BYTES as u64).read_to_string(&mut text)?;
            Ok(text)
        };
        let text = open().map_err(|error: io::Error| {
            // It is text where it is whole.
            if error.kind() == io::ErrorKind::InvalidData {
                damaged(path)
            } else {
                unreadable(path, &error)
            }
        })?;
        let mode = fs::metadata(path)?.mode();
        if mode & 0o077 != 0 {
            return Err(Error::new(
                ErrorKind::TrustViolation,
                format_args!("`{}` can be read by other users", path.display()),
            )
            .hint(format_args!("run `chmod 600 {}`", path.display())));
        }
        Ok(Self { path: path.to_owned(), text })
    }

    fn lines(&self) -> impl Iterator<Item = (&str, &str)> {
        self.text.lines().filter_map(|line| line.split_once(' '))
    }

    fn line(&self, name: &str) -> Option<&str> {
        self.lines().find(|(key, _)| *key == name).map(|(_, digits)| digits)
    }

    /// The secret of a name.
    fn fixed<const N: usize>(&self, name: &str) -> Result<Zeroizing<[u8; N]>> {
        self.secret(self.line(name).ok_or_else(|| damaged(&self.path))?)
    }

    /// The secrets whose names are `prefix` and a number.
    fn numbered<const N: usize>(&self, prefix: &str) -> Result<Vec<(u32, Zeroizing<[u8; N]>)>> {
        self.lines()
            .filter_map(|(name, digits)| Some((name.strip_prefix(prefix)?, digits)))
            .map(|(number, digits)| {
                let number = number.parse().map_err(|_| damaged(&self.path))?;
                Ok((number, self.secret(digits)?))
            })
            .collect()
    }

    fn secret<const N: usize>(&self, digits: &str) -> Result<Zeroizing<[u8; N]>> {
        let mut secret = Zeroizing::new([0; N]);
        hex::decode_to_slice(digits, secret.as_mut_slice()).map_err(|_| damaged(&self.path))?;
        Ok(secret)
    }
}

/// The one share that was found under a label or id.
pub(crate) fn one_share<T>(mut found: Vec<T>, wanted: &str) -> Result<T> {
    match (found.pop(), found.len()) {
        (Some(share), 0) => Ok(share),
        (None, _) => Err(Error::new(
            ErrorKind::Usage,
            format_args!("this home joined no share that is called `{wanted}`"),
        )
        .hint("`connect shares` lists them")),
        (Some(_), others) => Err(Error::new(
            ErrorKind::Usage,
            format_args!("{} shares are called `{wanted}`", others + 1),
        )
        .hint("name one of them by its id, which `connect shares` shows")),
    }
}

/// The name of a static key's line.
fn static_line(counter: u64) -> String {
    format!("static-{counter}")
}

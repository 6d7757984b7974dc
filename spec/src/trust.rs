//! Who is a member: what the trust log says, entry by entry, and the judgement of a peer by it.
//!
//! Everything here is a function of signed objects and of a time that the caller passes in; the hub
//! runs it as a second lock, the agents as the first. PROTOCOL.md, "Trust log", "Verifying a peer".

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::{
    bytes::hex_newtype,
    ids::{AgentId, CredentialId, ServiceId, WorkspaceId},
    keys::{IdentityKey, StaticPublicKey},
    limits::{
        CLOCK_TOLERANCE, MAX_BRANCHES, MAX_CERTS, MAX_LOG_BYTES, MAX_LOG_ENTRIES, MAX_SIGNERS,
    },
    log::{Change, Entry, EntryHash, Head, LogEntry, ObjectHash, Policy, Recovery},
    objects::{
        AgentRole, Certificate, Credential, CredentialKind, Genesis, Issuer, NoiseKey, SignerRole,
        UnixTime,
    },
    signed::Signed,
};

/// Why a genesis or a peer is not trusted. All are trust violations; none is repaired by trying again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TrustError {
    /// The genesis does not hash to the workspace id, or a founder did not sign it.
    #[error("the genesis is not the one that the workspace id names")]
    Genesis,
    /// An object is for another workspace.
    #[error("an object belongs to another workspace")]
    Workspace,
    /// The identity key does not give the agent id that was named.
    #[error("the certificate is not that of the agent that was named")]
    Agent,
    /// The NoiseKey is not signed by the identity key, or is for another agent.
    #[error("the static key is not bound to the agent's identity")]
    NoiseKey,
    /// The issuer is neither a signer at this head nor the credential presented.
    #[error("the certificate's issuer is unknown")]
    IssuerUnknown,
    /// The credential does not hold: its issuer is no signer, or its signature is wrong.
    #[error("the credential is not signed by a signer of the workspace")]
    Credential,
    /// The certificate's signature does not hold.
    #[error("the certificate is not signed by its issuer")]
    Certificate,
    /// Role, tags or services differ from what the credential grants.
    #[error("the certificate claims more than its credential grants")]
    Exceeds,
    /// The certificate or its credential ended.
    #[error("the certificate has expired")]
    Expired,
    /// The credential is closed, and the certificate is not one that stays valid.
    #[error("the invite or share of the certificate is closed, and it was not kept")]
    Closed,
    /// The agent, or this certificate of it, is revoked.
    #[error("the agent was revoked")]
    Revoked,
}

impl TrustError {
    /// A word for programs and logs.
    #[must_use]
    pub fn code(self) -> &'static str {
        match self {
            Self::Genesis => "genesis",
            Self::Workspace => "workspace",
            Self::Agent => "agent",
            Self::NoiseKey => "noise_key",
            Self::IssuerUnknown => "issuer_unknown",
            Self::Credential => "credential",
            Self::Certificate => "certificate",
            Self::Exceeds => "exceeds",
            Self::Expired => "expired",
            Self::Closed => "closed",
            Self::Revoked => "revoked",
        }
    }
}

/// Why an entry does not belong in a trust log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LogError {
    /// It is for another workspace.
    #[error("the entry belongs to another workspace")]
    Workspace,
    /// It does not follow the entry before it.
    #[error("the entry does not follow the one before it")]
    Place,
    /// A signature does not hold.
    #[error("a signature of the entry does not hold")]
    Signature,
    /// A signature is by a key that is no signer here.
    #[error("the entry is signed by a key that is no signer")]
    Signer,
    /// A signer's role does not allow a change.
    #[error("the entry makes a change that its signer may not make")]
    Role,
    /// No owner would be left.
    #[error("the entry would remove the last owner")]
    LastOwner,
    /// It removes a signer that there is not.
    #[error("the entry removes a signer that there is not")]
    NoSuchSigner,
    /// It makes a signer of a revoked agent.
    #[error("the entry makes a signer of a revoked agent")]
    RevokedSigner,
    /// More than [`MAX_SIGNERS`].
    #[error("a log has at most {MAX_SIGNERS} signers at a time")]
    TooManySigners,
    /// The number of the epoch is not the next.
    #[error("the entry begins an epoch that is not the next")]
    Epoch,
    /// The recovery's counter is not above the last one's, or another key signed it.
    #[error("the recovery is not by the recovery key in force, or an old one")]
    Recovery,
    /// More than [`MAX_LOG_ENTRIES`] or [`MAX_LOG_BYTES`].
    #[error("the log is full")]
    Full,
    /// The branch does not leave the log where it is said to.
    #[error("the entries do not branch off where they are said to")]
    NoBranch,
    /// More than [`MAX_BRANCHES`].
    #[error("more than {MAX_BRANCHES} branches of the log were shown")]
    TooManyBranches,
}

/// What an agent shows of itself: in a login, in a service record and in the handshake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Presented {
    /// Certifies the identity key.
    pub certificate: Signed<Certificate>,
    /// The credential under which the certificate was made, if one was.
    pub credential: Option<Signed<Credential>>,
    /// Binds the static key to the identity key.
    pub noise_key: Signed<NoiseKey>,
}

/// Proof that [`TrustState::verify_peer`] accepted a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedPeer {
    agent_id: AgentId,
    presented: Presented,
}

impl VerifiedPeer {
    /// The peer's id.
    #[must_use]
    pub fn agent_id(&self) -> AgentId {
        self.agent_id
    }

    /// The peer's identity key.
    #[must_use]
    pub fn identity_key(&self) -> IdentityKey {
        self.certificate().identity_key
    }

    /// The signer key that vouches for this agent's first certificate: that of a founder is its own,
    /// since everybody else joins by a credential.
    #[must_use]
    pub fn founder_key(&self) -> Option<IdentityKey> {
        match self.certificate().issuer {
            Issuer::Signer(key) if self.certificate().serial == 1 => Some(key),
            Issuer::Signer(_) | Issuer::Credential(_) => None,
        }
    }

    /// The key that its Noise handshake must use.
    #[must_use]
    pub fn static_key(&self) -> StaticPublicKey {
        self.presented.noise_key.object().static_key
    }

    /// The counter of that key.
    #[must_use]
    pub fn noise_key_counter(&self) -> u64 {
        self.presented.noise_key.object().counter
    }

    /// The certificate, verified.
    #[must_use]
    pub fn certificate(&self) -> &Certificate {
        self.presented.certificate.object()
    }

    /// Everything that was presented, verified.
    #[must_use]
    pub fn presented(&self) -> &Presented {
        &self.presented
    }

    /// The credential by which the peer joined, if it did not get its certificate from a signer.
    #[must_use]
    pub fn credential_id(&self) -> Option<CredentialId> {
        self.presented.credential.as_ref().map(|credential| credential.object().id())
    }

    /// The services that a guest may reach; `None` for members.
    #[must_use]
    pub fn services(&self) -> Option<&[ServiceId]> {
        self.certificate().services.as_deref()
    }
}

hex_newtype!(
    /// `H("epoch", M || W)`: what the log says of an epoch's secrets.
    EpochCommit,
    32
);

/// What was ended. Grows, never shrinks.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Ended {
    /// Former signers, and what stays valid of what each issued.
    signers: BTreeMap<IdentityKey, BTreeSet<ObjectHash>>,
    /// Revoked agents: all certificates, or those below a serial.
    agents: BTreeMap<AgentId, Option<u64>>,
    /// Closed credentials, and the certificates under each that stay valid.
    credentials: BTreeMap<CredentialId, BTreeSet<ObjectHash>>,
}

impl Ended {
    fn end_signer(&mut self, key: IdentityKey, keep: impl IntoIterator<Item = ObjectHash>) {
        self.signers.insert(key, keep.into_iter().collect());
    }

    /// Takes over all that another view of the same branch ended, signers too.
    fn absorb_view(&mut self, other: &Self) {
        self.absorb(other);
        for (key, keep) in &other.signers {
            self.signers
                .entry(*key)
                .and_modify(|before| before.retain(|hash| keep.contains(hash)))
                .or_insert_with(|| keep.clone());
        }
    }

    fn revoke(&mut self, agent: AgentId, below_serial: Option<u64>) {
        let ended = self.agents.entry(agent).or_insert(Some(0));
        *ended = match (*ended, below_serial) {
            (Some(before), Some(now)) => Some(before.max(now)),
            (None, _) | (_, None) => None,
        };
    }

    /// Closes a credential; one that was closed before keeps only what is kept again.
    fn close(&mut self, credential: CredentialId, keep: impl IntoIterator<Item = ObjectHash>) {
        let keep: BTreeSet<_> = keep.into_iter().collect();
        self.credentials
            .entry(credential)
            .and_modify(|before| before.retain(|hash| keep.contains(hash)))
            .or_insert(keep);
    }

    /// Takes over the agents and credentials that were ended elsewhere. Not the signers: whether an
    /// entry is valid must follow from its own branch alone, or agents could not agree on it.
    fn absorb(&mut self, other: &Self) {
        for (agent, below_serial) in &other.agents {
            self.revoke(*agent, *below_serial);
        }
        for (credential, keep) in &other.credentials {
            self.close(*credential, keep.iter().copied());
        }
    }
}

/// The keys that signed one entry.
type Keys = BTreeSet<IdentityKey>;

/// A signer at a head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Signer {
    role: SignerRole,
    /// The entry that made it one; what a fork adds counts on no branch.
    since: u64,
    /// The entry that made it an owner, if it is one: it may have been an admin before.
    #[serde(default)]
    owner_since: u64,
}

/// Another branch of a forked log: proven by an entry that two signers, or one twice, put in a place
/// that was taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Branch {
    /// The last entry that both branches have.
    after: u64,
    /// The newest entry of it that is known.
    head: Head,
    /// Who signed its first entry, and who the own entry in that place. Who signed more than one entry
    /// for a place cannot settle a fork there.
    signed_by: Keys,
    held_by: Keys,
    /// Who is a signer where the branches part and ever since on this one, in the lowest role.
    signers: BTreeMap<IdentityKey, SignerRole>,
    /// The strictest policy of all the entries of it that are known.
    policy: Policy,
    /// What this branch ended.
    ended: Ended,
}

impl Branch {
    /// Takes over what was seen of this branch before: it may have forked in itself.
    fn absorb(&mut self, known: &Self) {
        lower(&mut self.signers, |key| known.signers.get(key).copied());
        self.policy.strict |= known.policy.strict;
        self.ended.absorb_view(&known.ended);
        if known.head.seq > self.head.seq {
            self.head = known.head;
        }
    }
}

/// Leaves the signers that are signers elsewhere too, each in the lower of its roles.
fn lower(
    signers: &mut BTreeMap<IdentityKey, SignerRole>,
    elsewhere: impl Fn(&IdentityKey) -> Option<SignerRole>,
) {
    signers.retain(|key, role| match elsewhere(key) {
        Some(SignerRole::Owner) => true,
        Some(SignerRole::Admin) => {
            *role = SignerRole::Admin;
            true
        }
        None => false,
    });
}

/// The recovery key in force.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct RecoveryPoint {
    key: IdentityKey,
    /// Of the last recovery; 0 before the first.
    counter: u64,
    /// Its entry; 0 before the first. Branches that begin at or before it are settled.
    seq: u64,
}

/// What the trust log says at one head. Holds no secret.
///
/// It is serialised as an agent's own, verified copy; never as a message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrustState {
    workspace_id: WorkspaceId,
    head: Head,
    /// Bytes of all bodies after the genesis.
    bytes: u64,
    /// Whether an entry up to the head holds a critical change that this version does not know.
    frozen: bool,
    signers: BTreeMap<IdentityKey, Signer>,
    ended: Ended,
    epoch: u32,
    commits: BTreeMap<u32, EpochCommit>,
    policy: Policy,
    recovery: RecoveryPoint,
    /// First entries of branches that were given up, and who signed each entry that did so.
    abandoned: BTreeMap<EntryHash, BTreeSet<Keys>>,
    /// Other branches, by their first entry: none unless the log forked.
    branches: BTreeMap<EntryHash, Branch>,
    /// What was ended on branches that are settled by now, and stays so.
    elsewhere: Ended,
}

/// What came of [`TrustState::consider`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Considered {
    /// The branch was given up by an owner or cut off by a recovery: it changes nothing.
    Settled,
    /// The log forked: this is the state that heeds the revocations of the branch too. Of a branch that
    /// was given up before it was shown, agents and credentials stay ended, and
    /// [`TrustState::is_forked`] does not count it.
    Forked(Box<TrustState>),
    /// The branch takes the place of the own entries: a recovery, or an owner who gave them up.
    Replaces(Box<TrustState>),
}

/// Whether the signatures of an entry were verified before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Signatures {
    Verify,
    Verified,
}

impl TrustState {
    /// Starts from the genesis that `anchor` names.
    ///
    /// # Errors
    /// [`TrustError::Genesis`] when it hashes to another id, or when a founder did not sign it.
    ///
    /// # Security
    /// `anchor` must come from an invite or from this agent's own disk, never from the hub.
    pub fn from_genesis(
        anchor: WorkspaceId,
        genesis: &Signed<Genesis>,
    ) -> Result<Self, TrustError> {
        let founders = &genesis.object().founders;
        let signed_by_all = founders.len() == genesis.signatures().len()
            && founders.iter().zip(genesis.signatures()).all(|(f, (key, _))| f.key == *key);
        if genesis.hash() != anchor.0 || !signed_by_all || genesis.verify_all().is_err() {
            return Err(TrustError::Genesis);
        }
        let genesis = genesis.object();
        Ok(Self {
            workspace_id: anchor,
            head: Head::genesis(anchor),
            bytes: 0,
            frozen: false,
            signers: founders
                .iter()
                .map(|founder| {
                    (founder.key, Signer { role: founder.role, since: 0, owner_since: 0 })
                })
                .collect(),
            ended: Ended::default(),
            epoch: 0,
            commits: [(0, EpochCommit(genesis.epoch_commit))].into(),
            policy: Policy::default(),
            recovery: RecoveryPoint { key: genesis.recovery_key, counter: 0, seq: 0 },
            abandoned: BTreeMap::new(),
            branches: BTreeMap::new(),
            elsewhere: Ended::default(),
        })
    }

    /// The workspace.
    #[must_use]
    pub fn workspace_id(&self) -> WorkspaceId {
        self.workspace_id
    }

    /// The place in the log that this state describes.
    #[must_use]
    pub fn head(&self) -> Head {
        self.head
    }

    /// Whether the log holds a critical change that this version does not know. Revocations are heeded
    /// none the less; new tunnels must be refused.
    #[must_use]
    pub fn is_frozen(&self) -> bool {
        self.frozen
    }

    /// Whether the log forked and nobody settled it yet.
    #[must_use]
    pub fn is_forked(&self) -> bool {
        !self.branches.is_empty()
    }

    /// The newest known entry of each other branch, by the branch's first entry.
    pub fn branches(&self) -> impl Iterator<Item = (EntryHash, Head)> + '_ {
        self.branches.iter().map(|(first, branch)| (*first, branch.head))
    }

    /// The current epoch.
    #[must_use]
    pub fn epoch(&self) -> u32 {
        self.epoch
    }

    /// `H("epoch", M || W)` of an epoch that the log has begun.
    #[must_use]
    pub fn epoch_commit(&self, epoch: u32) -> Option<&[u8; 32]> {
        self.commits.get(&epoch).map(EpochCommit::as_bytes)
    }

    /// What the workspace demands. In a fork, the stricter of both branches.
    #[must_use]
    pub fn policy(&self) -> Policy {
        let strict =
            self.policy.strict || self.branches.values().any(|branch| branch.policy.strict);
        Policy { strict }
    }

    /// The recovery key in force, and the counter of the last recovery.
    #[must_use]
    pub fn recovery(&self) -> (IdentityKey, u64) {
        (self.recovery.key, self.recovery.counter)
    }

    /// What `key` may do as a signer at this head. In a fork: on every branch, and before it.
    #[must_use]
    pub fn signer_role(&self, key: &IdentityKey) -> Option<SignerRole> {
        let signer = self.signers.get(key).filter(|_| !self.is_overrun())?;
        let mut lowest = signer.role;
        for branch in self.branches.values() {
            let there = *branch.signers.get(key)?;
            let here = self.role_since(key, branch.after)?;
            if [here, there].contains(&SignerRole::Admin) {
                lowest = SignerRole::Admin;
            }
        }
        Some(lowest)
    }

    /// Whether there may be branches that could not be taken in: what they revoke is not known, so
    /// nobody's word counts until an owner settles some, or the recovery key all.
    fn is_overrun(&self) -> bool {
        self.branches.len() >= MAX_BRANCHES
    }

    /// Whether `key` is a signer at this head.
    #[must_use]
    pub fn is_signer(&self, key: &IdentityKey) -> bool {
        self.signer_role(key).is_some()
    }

    /// The signers at this head.
    pub fn signers(&self) -> impl Iterator<Item = (IdentityKey, SignerRole)> + '_ {
        self.signers.keys().filter_map(|key| Some((*key, self.signer_role(key)?)))
    }

    /// Everything that was ended: on the own branch, on the others, and on those that are settled.
    fn endings(&self) -> impl Iterator<Item = &Ended> {
        let branches = self.branches.values().map(|branch| &branch.ended);
        [&self.ended, &self.elsewhere].into_iter().chain(branches)
    }

    /// Whether the agent is revoked, with this certificate and all that have a lower serial.
    #[must_use]
    pub fn is_revoked(&self, agent: &AgentId, serial: u64) -> bool {
        self.endings().any(|ended| match ended.agents.get(agent) {
            Some(Some(below)) => serial < *below,
            Some(None) => true,
            None => false,
        })
    }

    /// Whether nobody joins by the credential any more.
    #[must_use]
    pub fn is_closed(&self, credential: &CredentialId) -> bool {
        self.endings().any(|ended| ended.credentials.contains_key(credential))
    }

    /// Whether what `issuer` signed is valid: a signer's own word, or a former one's that is kept.
    fn vouches(&self, issuer: &IdentityKey, object: ObjectHash) -> bool {
        if self.is_overrun() {
            return false;
        }
        let mut ended = self.endings().filter_map(|ended| ended.signers.get(issuer)).peekable();
        if ended.peek().is_some() {
            ended.all(|keep| keep.contains(&object))
        } else {
            self.is_signer(issuer)
        }
    }

    /// Takes the next entry of the log: all of it, or, when it is an error, nothing.
    ///
    /// # Errors
    /// [`LogError`]: the first rule that is broken.
    pub fn apply(&mut self, entry: &LogEntry) -> Result<(), LogError> {
        self.take(entry, Signatures::Verify)
    }

    /// As [`TrustState::apply`], for an entry whose signatures this program verified before it stored
    /// it: a log is read back fifty times as fast as it was verified.
    ///
    /// # Errors
    /// [`LogError`], but for [`LogError::Signature`].
    ///
    /// # Security
    /// Only for what comes from this program's own store.
    pub fn apply_stored(&mut self, entry: &LogEntry) -> Result<(), LogError> {
        self.take(entry, Signatures::Verified)
    }

    fn take(&mut self, entry: &LogEntry, signatures: Signatures) -> Result<(), LogError> {
        if entry.workspace_id() != self.workspace_id {
            return Err(LogError::Workspace);
        }
        if entry.follows() != self.head {
            return Err(LogError::Place);
        }
        let bytes = self.bytes + entry.body_bytes() as u64;
        if self.head.seq >= MAX_LOG_ENTRIES || bytes > MAX_LOG_BYTES {
            return Err(LogError::Full);
        }
        if signatures == Signatures::Verify && entry.verify_all().is_err() {
            return Err(LogError::Signature);
        }
        match entry {
            LogEntry::Entry(signed) => self.take_changes(signed)?,
            LogEntry::Recovery(signed) => self.take_recovery(signed)?,
        }
        self.bytes = bytes;
        self.head = entry.head();
        Ok(())
    }

    fn take_changes(&mut self, signed: &Signed<Entry>) -> Result<(), LogError> {
        let entry = signed.object();
        let roles: Vec<_> = signed
            .signatures()
            .iter()
            .map(|(key, _)| self.signers.get(key).map(|signer| signer.role))
            .collect();
        if self.frozen {
            // Who else is a signer by now, and who may do what, is not known here: one signer that is
            // known must do, and only what it ends counts.
            if roles.iter().all(Option::is_none) {
                return Err(LogError::Signer);
            }
            entry.changes.iter().for_each(|change| self.end(change));
            return Ok(());
        }
        if roles.contains(&None) {
            return Err(LogError::Signer);
        }
        let by_owners = roles.iter().all(|role| *role == Some(SignerRole::Owner));
        if !by_owners && !entry.abandons.is_empty() {
            return Err(LogError::Role);
        }
        if entry.changes.iter().any(Change::is_unknown_critical) {
            // Up to here everything is known, and so is who may make the changes that are.
            if !by_owners && entry.changes.iter().any(|change| self.is_for_owners(change)) {
                return Err(LogError::Role);
            }
            self.frozen = true;
            entry.changes.iter().for_each(|change| self.end(change));
            return Ok(());
        }
        self.check_changes(&entry.changes, by_owners)?;
        for change in &entry.changes {
            match change {
                Change::AddSigner { key, role } => {
                    let before = self.signers.get(key);
                    let since = before.map_or(entry.seq, |signer| signer.since);
                    let owner_since = before
                        .filter(|signer| signer.role == SignerRole::Owner)
                        .map_or(entry.seq, |signer| signer.owner_since);
                    self.signers.insert(*key, Signer { role: *role, since, owner_since });
                    // An owner vouches for the key again, and so for what it signed.
                    self.ended.signers.remove(key);
                }
                Change::EpochKey { epoch, commit } => {
                    self.epoch = *epoch;
                    self.commits.insert(*epoch, EpochCommit(*commit));
                }
                Change::Policy(policy) => self.policy = *policy,
                Change::RemoveSigner { .. }
                | Change::RevokeAgent { .. }
                | Change::CloseCredential { .. } => self.end(change),
                Change::Unknown(_) => {}
            }
        }
        if !entry.abandons.is_empty() {
            self.abandon(signed);
        }
        Ok(())
    }

    /// Whether only owners may make a change.
    fn is_for_owners(&self, change: &Change) -> bool {
        match change {
            Change::AddSigner { .. } | Change::RemoveSigner { .. } | Change::Policy(_) => true,
            Change::RevokeAgent { agent_id, .. } => self
                .signer_key_of(agent_id)
                .and_then(|key| self.signers.get(&key))
                .is_some_and(|signer| signer.role == SignerRole::Owner),
            Change::CloseCredential { .. } | Change::EpochKey { .. } | Change::Unknown(_) => false,
        }
    }

    /// The signer key that is the identity key of an agent, if it is a signer by it.
    fn signer_key_of(&self, agent: &AgentId) -> Option<IdentityKey> {
        signer_key_of(&self.workspace_id, agent, self.signers.keys())
    }

    /// Whether every change of an entry is allowed, each after the ones before it.
    fn check_changes(&self, changes: &[Change], by_owners: bool) -> Result<(), LogError> {
        let mut signers: BTreeMap<_, _> =
            self.signers.iter().map(|(key, signer)| (*key, signer.role)).collect();
        let mut epoch = self.epoch;
        let mut revoked = Vec::new();
        let owners_only = if by_owners { Ok(()) } else { Err(LogError::Role) };
        for change in changes {
            match change {
                Change::AddSigner { key, role } => {
                    owners_only?;
                    let agent = AgentId::of(&self.workspace_id, key);
                    if revoked.contains(&agent) || self.ended.agents.get(&agent) == Some(&None) {
                        return Err(LogError::RevokedSigner);
                    }
                    signers.insert(*key, *role);
                    if signers.len() > MAX_SIGNERS {
                        return Err(LogError::TooManySigners);
                    }
                }
                Change::RemoveSigner { key, .. } => {
                    owners_only?;
                    signers.remove(key).ok_or(LogError::NoSuchSigner)?;
                }
                Change::RevokeAgent { agent_id, below_serial } => {
                    let key = signer_key_of(&self.workspace_id, agent_id, signers.keys());
                    // Without its certificates an owner could not reach the hub to answer.
                    if key.is_some_and(|key| signers.get(&key) == Some(&SignerRole::Owner)) {
                        owners_only?;
                    }
                    if below_serial.is_none() {
                        revoked.push(*agent_id);
                        key.and_then(|key| signers.remove(&key));
                    }
                }
                Change::EpochKey { epoch: next, .. } => {
                    if epoch.checked_add(1) != Some(*next) {
                        return Err(LogError::Epoch);
                    }
                    epoch = *next;
                }
                Change::Policy(_) => owners_only?,
                Change::CloseCredential { .. } | Change::Unknown(_) => {}
            }
        }
        if signers.values().any(|role| *role == SignerRole::Owner) {
            Ok(())
        } else {
            Err(LogError::LastOwner)
        }
    }

    /// Ends what a change ends.
    fn end(&mut self, change: &Change) {
        match change {
            Change::RemoveSigner { key, keep } => {
                if self.signers.remove(key).is_some() {
                    self.ended.end_signer(*key, keep.iter().copied());
                }
            }
            Change::RevokeAgent { agent_id, below_serial } => {
                self.ended.revoke(*agent_id, *below_serial);
                let key = self.signer_key_of(agent_id);
                if let Some(key) = key.filter(|_| below_serial.is_none()) {
                    self.signers.remove(&key);
                    self.ended.end_signer(key, []);
                }
            }
            Change::CloseCredential { credential_id, keep } => {
                self.ended.close(*credential_id, keep.iter().copied());
            }
            Change::AddSigner { .. }
            | Change::EpochKey { .. }
            | Change::Policy(_)
            | Change::Unknown(_) => {}
        }
    }

    /// Gives up branches: those that are known and that the signers of the entry may give up end now,
    /// the others when they are shown.
    fn abandon(&mut self, signed: &Signed<Entry>) {
        let owners: Keys = signed.signatures().iter().map(|(key, _)| *key).collect();
        for first in &signed.object().abandons {
            self.abandoned.entry(*first).or_default().insert(owners.clone());
        }
        self.settle();
    }

    /// Ends the branches that were given up by those who may. Where one ends that removed a signer, that
    /// signer's word on another one may count again.
    fn settle(&mut self) {
        let given_up = |state: &Self| {
            let mut branches = state.branches.iter();
            branches.find(|(first, branch)| state.gives_up(first, branch)).map(|(first, _)| *first)
        };
        while let Some(branch) = given_up(self).and_then(|first| self.branches.remove(&first)) {
            self.elsewhere.absorb(&branch.ended);
        }
    }

    /// Whether an own entry gives up a branch and counts.
    fn gives_up(&self, first: &EntryHash, branch: &Branch) -> bool {
        self.abandoned.get(first).into_iter().flatten().any(|owners| {
            owners.iter().all(|key| {
                branch.signers.get(key) == Some(&SignerRole::Owner)
                    && self.may_settle(key, first, branch)
            })
        })
    }

    /// Whether a key is that of an owner on every other branch, and signed only one of the entries that
    /// follow where `branch` leaves the log.
    fn may_settle(&self, key: &IdentityKey, first: &EntryHash, branch: &Branch) -> bool {
        let others = || self.branches.iter().filter(|(other, _)| *other != first);
        let siblings = others().filter(|(_, other)| other.after == branch.after);
        let signed = siblings
            .map(|(_, other)| &other.signed_by)
            .chain([&branch.signed_by, &branch.held_by])
            .filter(|keys| keys.contains(key));
        signed.count() <= 1
            && others().all(|(_, other)| other.signers.get(key) == Some(&SignerRole::Owner))
    }

    fn take_recovery(&mut self, signed: &Signed<Recovery>) -> Result<(), LogError> {
        let recovery = signed.object();
        let by_key = matches!(signed.signatures(), [(signer, _)] if *signer == self.recovery.key);
        if !by_key || recovery.counter <= self.recovery.counter {
            return Err(LogError::Recovery);
        }
        let since = self.head.seq + 1;
        let signers: BTreeMap<_, _> = recovery
            .signers
            .iter()
            .map(|signer| (signer.key, Signer { role: signer.role, since, owner_since: since }))
            .collect();
        for key in std::mem::take(&mut self.signers).into_keys() {
            self.ended.end_signer(key, recovery.keep.iter().copied());
        }
        self.ended.signers.retain(|key, _| !signers.contains_key(key));
        self.signers = signers;
        self.recovery =
            RecoveryPoint { key: recovery.recovery_key, counter: recovery.counter, seq: since };
        for branch in std::mem::take(&mut self.branches).into_values() {
            self.elsewhere.absorb(&branch.ended);
        }
        Ok(())
    }

    /// Judges entries that leave the own log after `base`, in place of `held`.
    ///
    /// `base` is the state of the own log at the place where they leave it, `held` the own entry that
    /// follows there, and `branch` the whole other branch from there on, as far as it is known.
    ///
    /// # Errors
    /// [`LogError`]: the first entry that does not hold, and then nothing of the branch counts;
    /// [`LogError::NoBranch`] when there is no second entry in one place;
    /// [`LogError::TooManyBranches`].
    pub fn consider(
        &self,
        base: &Self,
        held: &LogEntry,
        branch: &[LogEntry],
    ) -> Result<Considered, LogError> {
        let Some(sibling) = branch.first() else {
            return Err(LogError::NoBranch);
        };
        let first = sibling.hash();
        if held.follows() != base.head || sibling.follows() != base.head || first == held.hash() {
            return Err(LogError::NoBranch);
        }
        let mut other = base.clone();
        let mut proven = Branch {
            after: base.head.seq,
            head: base.head,
            signed_by: sibling.signed_by().into_iter().collect(),
            held_by: held.signed_by().into_iter().collect(),
            signers: base.signers.iter().map(|(key, signer)| (*key, signer.role)).collect(),
            policy: base.policy,
            ended: Ended::default(),
        };
        for entry in branch {
            other.apply(entry)?;
            lower(&mut proven.signers, |key| other.role_since(key, proven.after));
            proven.policy.strict |= other.policy.strict;
        }
        proven.head = other.head;
        proven.ended = other.ended.clone();
        if other.recovery.counter > self.recovery.counter {
            return Ok(Considered::Replaces(Box::new(self.replaced_by(other, base, sibling))));
        }
        if sibling.head().seq <= self.recovery.seq {
            return Ok(Considered::Settled);
        }
        let known = self.branches.get(&first);
        if let Some(known) = known {
            proven.absorb(known);
        }
        let ours_gives_up = self.gives_up(&first, &proven);
        let other_gives_up =
            other.abandoned.get(&held.hash()).into_iter().flatten().any(|owners| {
                owners.iter().all(|key| {
                    base.role_since(key, base.head.seq) == Some(SignerRole::Owner)
                        && self.role_since(key, base.head.seq) == Some(SignerRole::Owner)
                        && self.may_settle(key, &first, &proven)
                })
            });
        // Where each was given up by an owner of the other, all readers must choose the same.
        if other_gives_up && (!ours_gives_up || first < held.hash()) {
            return Ok(Considered::Replaces(Box::new(self.replaced_by(other, base, sibling))));
        }
        let mut forked = self.clone();
        if ours_gives_up {
            forked.branches.remove(&first);
            forked.elsewhere.absorb(&proven.ended);
            return Ok(if forked == *self {
                Considered::Settled
            } else {
                Considered::Forked(Box::new(forked))
            });
        }
        if known.is_none() && self.is_overrun() {
            return Err(LogError::TooManyBranches);
        }
        forked.branches.insert(first, proven);
        Ok(Considered::Forked(Box::new(forked)))
    }

    /// The lowest role that a signer had at entry `seq` and ever since, if it was one.
    fn role_since(&self, key: &IdentityKey, seq: u64) -> Option<SignerRole> {
        let signer = self.signers.get(key).filter(|signer| signer.since <= seq)?;
        Some(if signer.owner_since <= seq { signer.role } else { SignerRole::Admin })
    }

    /// The state of another branch, which takes the place of this one: what this one ended stays so, and
    /// so do the branches that left the log no later than the other did.
    fn replaced_by(&self, mut other: Self, base: &Self, sibling: &LogEntry) -> Self {
        for ended in self.endings() {
            other.elsewhere.absorb(ended);
        }
        if other.recovery.counter > self.recovery.counter {
            return other;
        }
        let sibling_by: Keys = sibling.signed_by().into_iter().collect();
        other.branches = self.branches.clone();
        other
            .branches
            .retain(|first, branch| branch.after <= base.head.seq && *first != sibling.hash());
        for branch in other.branches.values_mut().filter(|branch| branch.after == base.head.seq) {
            branch.held_by = sibling_by.clone();
        }
        other.settle();
        other
    }

    /// Whether a closed credential keeps a certificate; `None` when it is not closed.
    fn keeps(&self, credential: &CredentialId, certificate: ObjectHash) -> Option<bool> {
        self.endings()
            .filter_map(|ended| ended.credentials.get(credential))
            .map(|keep| keep.contains(&certificate))
            .reduce(|left, right| left && right)
    }

    /// Verifies a credential by itself: for this workspace, by a signer at this head or kept of a former
    /// one. Whether it is closed is another question.
    ///
    /// # Errors
    /// [`TrustError::Workspace`], [`TrustError::Credential`].
    pub fn verify_credential(&self, credential: &Signed<Credential>) -> Result<(), TrustError> {
        let issuer = &credential.object().issuer;
        if credential.object().workspace_id != self.workspace_id {
            return Err(TrustError::Workspace);
        }
        let dates = credential.object();
        let lasts = dates.certs_end.saturating_sub(dates.join_until);
        if !self.vouches(issuer, ObjectHash(credential.hash()))
            || lasts > MAX_CERTS.as_secs()
            || credential.verify_by(issuer).is_err()
        {
            return Err(TrustError::Credential);
        }
        Ok(())
    }

    /// Judges what a peer presents: steps 1 to 7 of PROTOCOL.md, "Verifying a peer", but for the
    /// NoiseKey counter (step 3, which needs the reader's memory) and the tags (step 6, which
    /// travel inside the handshake).
    ///
    /// `expected` is the agent that the prologue, the hub or the record named.
    ///
    /// # Errors
    /// [`TrustError`]: the first rule that is broken.
    pub fn verify_peer(
        &self,
        expected: AgentId,
        presented: Presented,
        now: UnixTime,
    ) -> Result<VerifiedPeer, TrustError> {
        let certificate = presented.certificate.object();
        let noise_key = presented.noise_key.object();
        if certificate.workspace_id != self.workspace_id
            || noise_key.workspace_id != self.workspace_id
        {
            return Err(TrustError::Workspace);
        }
        if certificate.agent_id() != expected {
            return Err(TrustError::Agent);
        }
        // First, so that people hear of it whatever else is wrong by now.
        if self.is_revoked(&expected, certificate.serial) {
            return Err(TrustError::Revoked);
        }
        if noise_key.agent_id != expected
            || presented.noise_key.verify_by(&certificate.identity_key).is_err()
        {
            return Err(TrustError::NoiseKey);
        }
        match certificate.issuer {
            Issuer::Signer(issuer) => {
                // A credential beside a signer's certificate would be an unverified passenger.
                let vouched = self.vouches(&issuer, ObjectHash(presented.certificate.hash()));
                if !vouched || presented.credential.is_some() {
                    return Err(TrustError::IssuerUnknown);
                }
                if presented.certificate.verify_by(&issuer).is_err() {
                    return Err(TrustError::Certificate);
                }
                if certificate.role == AgentRole::Guest || certificate.services.is_some() {
                    return Err(TrustError::Exceeds);
                }
            }
            Issuer::Credential(hash) => {
                let credential = presented
                    .credential
                    .as_ref()
                    .filter(|credential| credential.hash() == hash)
                    .ok_or(TrustError::IssuerUnknown)?;
                self.verify_credential(credential)?;
                let credential = credential.object();
                if presented.certificate.verify_by(&credential.invite_key).is_err() {
                    return Err(TrustError::Certificate);
                }
                if certificate.role != credential.role
                    || certificate.attrs != credential.attrs
                    || certificate.services != credential.services
                {
                    return Err(TrustError::Exceeds);
                }
                let kept = self.keeps(&credential.id(), ObjectHash(presented.certificate.hash()));
                if kept == Some(false) {
                    return Err(TrustError::Closed);
                }
                // What a closure keeps of an invite never expires; a share always does, to the second.
                let end = match credential.kind {
                    CredentialKind::Invite if kept == Some(true) => UnixTime::MAX,
                    CredentialKind::Invite => {
                        credential.certs_end.saturating_add(CLOCK_TOLERANCE.as_secs())
                    }
                    CredentialKind::Share => credential.certs_end,
                };
                if now > end {
                    return Err(TrustError::Expired);
                }
            }
        }
        let ended = |end: UnixTime| now > end.saturating_add(CLOCK_TOLERANCE.as_secs());
        if certificate.not_after.is_some_and(ended) {
            return Err(TrustError::Expired);
        }
        Ok(VerifiedPeer { agent_id: expected, presented })
    }
}

/// The signer key that is the identity key of an agent, if it is a signer by it.
fn signer_key_of<'k>(
    workspace: &WorkspaceId,
    agent: &AgentId,
    mut signers: impl Iterator<Item = &'k IdentityKey>,
) -> Option<IdentityKey> {
    signers.find(|key| AgentId::of(workspace, key) == *agent).copied()
}

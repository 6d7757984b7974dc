//! What signers do: entries of the trust log, from the decision to the hub and to everybody's names.
//!
//! A signer never signs two entries for one place: an entry is on disk before it is sent, and is sent
//! again after a crash. PROTOCOL.md, "Trust log".

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use connect_crypto::{
    custody::Passphrase,
    keys::{RecoveryKey, SigningKey},
};
use connect_spec::{
    bytes::Blob,
    control::{ErrorCode, Reply, Request},
    ids::{AgentId, CredentialId},
    keys::IdentityKey,
    limits::MAX_KEPT,
    log::{Change, Entry, EntryHash, LogEntry, ObjectHash, Policy, Recovery},
    objects::{
        AgentRole, Certificate, Credential, CredentialKind, Founder, Issuer, SignerRole, UnixTime,
    },
    signed::Signed,
};
use serde::Serialize;
use zeroize::Zeroizing;

use crate::{
    clock,
    directory::{Directory, ListedMember},
    enrol,
    error::{Error, ErrorKind, Result},
    identity::Identity,
    io::hub::Session,
    random,
    trust::TrustLock,
    workspace::Workspace,
};

/// So often an entry is signed anew because another signer was faster.
const MAX_CONFLICTS: usize = 8;

/// What to do about an entry that the hub did not take.
const PENDING_HINT: &str =
    "the entry is signed and kept; the next command that signs sends it again";

/// An invite that is not closed, for people.
#[derive(Debug, Clone, Serialize)]
pub struct InviteInfo {
    /// Its id.
    pub id: CredentialId,
    /// How many agents may join by it.
    pub uses: u32,
    /// How many did, as the hub says.
    pub used: u32,
    /// Until when they may join.
    pub join_until: UnixTime,
    /// Whether nobody joins by it any more: it waits to be closed by a signer's agent.
    pub over: bool,
}

/// An entry of the trust log, for people.
#[derive(Debug, Clone, Serialize)]
pub struct EntryInfo {
    /// Its number.
    pub seq: u64,
    /// Its hash.
    pub hash: EntryHash,
    /// When it was signed, as its signer's clock said.
    pub time: UnixTime,
    /// Who signed it.
    pub signed_by: Vec<String>,
    /// What it changes, a line each.
    pub changes: Vec<String>,
}

/// What a recovery leaves to a person.
#[derive(Debug)]
pub struct Recovered {
    /// The words from here on. The old ones still restart a log that ends before this recovery.
    pub recovery_words: Zeroizing<String>,
    /// Agents that stay members.
    pub kept: usize,
}

/// What came of a revocation.
#[derive(Debug, Clone, Serialize)]
pub struct Revoked {
    /// The agent.
    pub agent_id: AgentId,
    /// What people called it.
    pub label: String,
    /// The entry that revokes it.
    pub seq: u64,
}

/// A signer at work, over a session of its own.
#[derive(Debug)]
pub struct Governor {
    directory: Directory,
    key: Arc<SigningKey>,
}

impl Governor {
    /// Lets a signer work; `passphrase` is asked for when its key needs one.
    ///
    /// # Errors
    /// As [`Identity::signing_key`].
    pub fn new(
        directory: Directory,
        passphrase: impl FnOnce() -> Result<Passphrase>,
    ) -> Result<Self> {
        let key = directory.workspace().identity().signing_key(passphrase)?;
        Ok(Self { directory, key })
    }

    /// The session that the signer works over.
    #[must_use]
    pub fn directory(&self) -> &Directory {
        &self.directory
    }

    /// Makes an invite; see [`enrol::invite`].
    ///
    /// # Errors
    /// As there.
    pub async fn invite(
        &self,
        expires: Duration,
        uses: u32,
        tags: Vec<String>,
    ) -> Result<Zeroizing<String>> {
        enrol::invite(&self.directory, &self.key, expires, uses, tags).await
    }

    pub(crate) fn key(&self) -> &SigningKey {
        &self.key
    }

    fn workspace(&self) -> &Arc<Workspace> {
        self.directory.workspace()
    }

    fn session(&self) -> &Session {
        self.directory.session()
    }

    /// Signs and appends what `decide` wants at the newest head; asked again when another signer was
    /// faster. Nothing is appended for no changes. Returns the number of the entry.
    async fn append(
        &self,
        decide: impl Fn(&Identity) -> Result<Vec<Change>>,
        epoch: NextEpoch,
    ) -> Result<u64> {
        let _signing = lock(self.workspace()).await?;
        let mut stale = BTreeSet::new();
        for _ in 0..MAX_CONFLICTS {
            self.finish_pending(&mut stale).await?;
            let identity = self.workspace().identity();
            let mut changes = decide(&identity)?;
            let head = identity.trust.head();
            if changes.is_empty() {
                self.spread().await?;
                return Ok(head.seq);
            }
            if epoch == NextEpoch::Begin {
                changes.push(self.next_epoch(&identity)?);
            }
            // An own entry that came too late must not look like a second one for its place.
            let is_owner =
                identity.trust.signer_role(&self.key.public()) == Some(SignerRole::Owner);
            let entry = LogEntry::Entry(self.sign(&Entry {
                workspace_id: identity.workspace_id(),
                seq: head.seq.saturating_add(1),
                prev: head.hash,
                time: clock::now(),
                changes,
                abandons: if is_owner { stale.iter().copied().collect() } else { Vec::new() },
            })?);
            identity.trust.as_ref().clone().apply(&entry).map_err(|error| {
                Error::new(ErrorKind::Refused, format_args!("this cannot be signed: {error}"))
            })?;
            self.workspace().home().save_pending(Some(&entry))?;
            if self.send(&entry).await? == Sent::Appended {
                self.spread().await?;
                return Ok(entry.head().seq);
            }
        }
        Err(Error::new(ErrorKind::Other, "other signers change the trust log all the time")
            .hint("try again"))
    }

    fn sign(&self, entry: &Entry) -> Result<Signed<Entry>> {
        self.key.try_sign(entry).map_err(|error| {
            Error::new(ErrorKind::Refused, format_args!("this is too much for one entry: {error}"))
        })
    }

    /// The change that begins the next epoch. Its secrets are on disk before the log speaks of them.
    fn next_epoch(&self, identity: &Identity) -> Result<Change> {
        let current = identity.epochs.current();
        if current.number != identity.trust.epoch() {
            return Err(Error::new(
                ErrorKind::Other,
                "the secrets of the current epoch have not reached this agent yet",
            )
            .hint("try again when another member is online"));
        }
        let epoch = current.number.saturating_add(1);
        let secrets = current.secrets.next(&mut random::rng());
        self.workspace().home().save_epoch(epoch, &secrets)?;
        Ok(Change::EpochKey { epoch, commit: secrets.commit() })
    }

    /// Sends the pending entry, and takes it into the own log when the hub took it.
    ///
    /// Whatever else the hub answers, it has the entry and may show it to others: it stays pending, and no
    /// other entry is signed for its place.
    async fn send(&self, entry: &LogEntry) -> Result<Sent> {
        let request = Request::Append { entries: vec![Blob(entry.encode())] };
        if let Reply::Error(report) = self.session().try_request(request).await? {
            if report.code == ErrorCode::Conflict {
                return Ok(Sent::Conflict);
            }
            return Err(Error::from_hub(&report).hint(PENDING_HINT));
        }
        self.workspace().learn(vec![entry.clone()]).await?;
        self.workspace().home().save_pending(None)?;
        Ok(Sent::Appended)
    }

    /// Compares the logs, and brings an entry that was signed before to its end: it is in the log, or it is
    /// sent again, or another signer's entry took its place, which makes it `stale`.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] when the hub takes neither this entry nor shows another one.
    async fn finish_pending(&self, stale: &mut BTreeSet<EntryHash>) -> Result<()> {
        let workspace = self.workspace();
        workspace.sync(self.session()).await?;
        let Some(entry) = workspace.home().load_pending()? else {
            return Ok(());
        };
        if entry.follows() == workspace.identity().trust.head() {
            if self.send(&entry).await? == Sent::Appended {
                return Ok(());
            }
            workspace.sync(self.session()).await?;
            if entry.follows() == workspace.identity().trust.head() {
                return Err(Error::new(
                    ErrorKind::Refused,
                    "the hub does not take an entry that follows the log as it shows it",
                )
                .hint(PENDING_HINT));
            }
        }
        if !workspace.knows(&entry.head()) {
            stale.insert(entry.hash());
        }
        workspace.home().save_pending(None)
    }

    /// Wraps a new epoch to everybody who stays.
    async fn spread(&self) -> Result<()> {
        self.workspace().wrap_missing(self.session()).await
    }

    /// Revokes an agent: all its certificates, for ever, and a new epoch, so that it reads no name that is
    /// made from now on. A signer that it is ends too; whom that one admitted stays.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] when it is the last owner, or this signer's role does not allow it.
    pub async fn revoke(&self, agent: &ListedMember) -> Result<Revoked> {
        let agent_id = agent.info.agent_id;
        let members = self.directory.members().await?;
        let key = signer_key(&self.workspace().identity(), agent);
        let keep = match key {
            Some(key) => self.issued_by(&key, &members, Some(agent_id)).await?,
            None => Vec::new(),
        };
        let decide = |identity: &Identity| {
            let mut changes = Vec::new();
            // By an entry that was pending, or by another signer.
            if identity.trust.is_revoked(&agent_id, u64::MAX) {
                return Ok(changes);
            }
            let role = identity.trust.signer_role(&self.key.public());
            if let Some(key) = key.filter(|key| identity.trust.is_signer(key))
                && role == Some(SignerRole::Owner)
            {
                changes.push(Change::RemoveSigner { key, keep: keep.clone() });
            }
            changes.push(Change::RevokeAgent { agent_id, below_serial: None });
            Ok(changes)
        };
        let seq = self.append(decide, NextEpoch::Begin).await?;
        Ok(Revoked { agent_id, label: agent.info.label.clone(), seq })
    }

    /// Gives an agent another role: a new certificate, and the end of those before it.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] for a guest.
    pub async fn change_role(&self, agent: &ListedMember, role: AgentRole) -> Result<u64> {
        let old = agent.presented.certificate.object();
        if old.role == AgentRole::Guest || role == AgentRole::Guest {
            return Err(Error::new(ErrorKind::Usage, "a guest of a share has no other role"));
        }
        // Its certificate is what tells whose the founder's key is: see `signer_key`.
        let identity = self.workspace().identity();
        if signer_key(&identity, agent).is_some_and(|key| key != old.identity_key) {
            return Err(Error::new(
                ErrorKind::Refused,
                format_args!("`{}` founded the workspace and signs for it", agent.info.label),
            )
            .hint(
                "make another agent an owner, then `connect trust remove-signer` this one first",
            ));
        }
        let serial = old.serial.saturating_add(1);
        let certificate = self.key.sign(&Certificate {
            role,
            serial,
            not_after: None,
            issuer: Issuer::Signer(self.key.public()),
            services: None,
            ..old.clone()
        });
        let certify = Request::Certify { certificate: Blob(certificate.encode()) };
        self.session().request(certify).await?;
        let change =
            Change::RevokeAgent { agent_id: agent.info.agent_id, below_serial: Some(serial) };
        self.append(|_| Ok(vec![change.clone()]), NextEpoch::Stay).await
    }

    /// Makes an agent a signer by its identity key.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] when this signer is no owner.
    pub async fn add_signer(&self, agent: &ListedMember, role: SignerRole) -> Result<u64> {
        let certificate = agent.presented.certificate.object();
        if certificate.role == AgentRole::Guest {
            return Err(Error::new(ErrorKind::Usage, "a guest does not sign for the workspace")
                .hint("let that machine join by an invite: `connect invite`"));
        }
        let key = certificate.identity_key;
        let add = Change::AddSigner { key, role };
        self.append(|_| Ok(vec![add.clone()]), NextEpoch::Stay).await
    }

    /// Ends the signer that an agent is; whom it admitted stays, and so does the agent.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] when it is none; [`ErrorKind::Refused`] when it is the last owner.
    pub async fn remove_signer(&self, agent: &ListedMember) -> Result<u64> {
        let key = signer_key(&self.workspace().identity(), agent).ok_or_else(|| {
            Error::new(ErrorKind::Usage, format_args!("`{}` is no signer", agent.info.label))
                .hint("`connect trust log` shows who is")
        })?;
        let members = self.directory.members().await?;
        let keep = self.issued_by(&key, &members, None).await?;
        let remove = Change::RemoveSigner { key, keep };
        self.append(|_| Ok(vec![remove.clone()]), NextEpoch::Stay).await
    }

    /// Sets the policy of the workspace.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] when this signer is no owner.
    pub async fn set_policy(&self, policy: Policy) -> Result<u64> {
        let decide = |identity: &Identity| {
            let same = identity.trust.policy() == policy;
            Ok(if same { Vec::new() } else { vec![Change::Policy(policy)] })
        };
        self.append(decide, NextEpoch::Stay).await
    }

    /// Settles a fork in favour of the branch that this agent follows, and begins a new epoch.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] when the log did not fork; [`ErrorKind::Refused`] when this signer signed both
    /// branches, or is no owner on both: the recovery words settle it then.
    pub async fn settle(&self) -> Result<u64> {
        let _signing = lock(self.workspace()).await?;
        self.finish_pending(&mut BTreeSet::new()).await?;
        let identity = self.workspace().identity();
        let abandons: Vec<_> = identity.trust.branches().map(|(first, _)| first).collect();
        if abandons.is_empty() {
            return Err(Error::new(ErrorKind::Usage, "the trust log did not fork"));
        }
        let head = identity.trust.head();
        let entry = LogEntry::Entry(self.sign(&Entry {
            workspace_id: identity.workspace_id(),
            seq: head.seq.saturating_add(1),
            prev: head.hash,
            time: clock::now(),
            changes: vec![self.next_epoch(&identity)?],
            abandons,
        })?);
        let mut settled = identity.trust.as_ref().clone();
        let applied = settled.apply(&entry);
        if applied.is_err() || settled.is_forked() {
            return Err(Error::new(ErrorKind::Refused, "this signer cannot settle the fork").hint(
                "an owner who did not sign both branches can; otherwise `connect trust recover`",
            ));
        }
        self.workspace().learn(vec![entry.clone()]).await?;
        self.workspace().sync(self.session()).await?;
        self.spread().await?;
        Ok(entry.head().seq)
    }

    /// Closes an invite: nobody joins by it any more. Who joined stays.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] for an id that the hub does not list as open.
    pub async fn close_invite(&self, id: CredentialId) -> Result<u64> {
        let open = self.directory.credentials().await?;
        let (credential, _) = open
            .iter()
            .find(|(credential, _)| {
                let credential = credential.object();
                credential.id() == id && credential.kind == CredentialKind::Invite
            })
            .ok_or_else(|| {
                Error::new(ErrorKind::Usage, format_args!("no open invite has the id {id}"))
                    .hint("`connect invites` lists them")
            })?;
        let members = self.directory.members().await?;
        self.close(id, joined_by(credential, &members)?).await
    }

    /// Closes a credential, but for these certificates.
    pub(crate) async fn close(
        &self,
        credential_id: CredentialId,
        keep: Vec<ObjectHash>,
    ) -> Result<u64> {
        let close = Change::CloseCredential { credential_id, keep };
        self.append(|_| Ok(vec![close.clone()]), NextEpoch::Stay).await
    }

    /// Closes every invite by which nobody can join any more, and keeps those who joined: from then on
    /// their certificates do not expire. Returns how many were closed.
    ///
    /// # Errors
    /// As a request to the hub.
    pub async fn close_due(&self) -> Result<usize> {
        let now = clock::now();
        let open = self.directory.credentials().await?;
        // A share ends by itself, with all who came by it.
        let due: Vec<_> = open
            .iter()
            .filter(|(credential, _)| credential.object().kind == CredentialKind::Invite)
            .filter(|(credential, used)| is_over(credential.object(), *used, now))
            .collect();
        if due.is_empty() {
            return Ok(0);
        }
        let members = self.directory.members().await?;
        let mut closed = 0;
        for (credential, _) in due {
            let id = credential.object().id();
            let keep = joined_by(credential, &members)?;
            let close = Change::CloseCredential { credential_id: id, keep };
            let decide = |identity: &Identity| {
                let done = identity.trust.is_closed(&id);
                Ok(if done { Vec::new() } else { vec![close.clone()] })
            };
            self.append(decide, NextEpoch::Stay).await?;
            closed += 1;
        }
        Ok(closed)
    }

    /// What a signer issued and is in use: certificates, and credentials with the members under them.
    async fn issued_by(
        &self,
        key: &IdentityKey,
        members: &[ListedMember],
        but: Option<AgentId>,
    ) -> Result<Vec<ObjectHash>> {
        let open = self.directory.credentials().await?;
        keep_issued(std::slice::from_ref(key), members, &open, but)
    }
}

/// Waits until no other process of the home signs. The wait may be long, so no thread that drives
/// connections does it.
async fn lock(workspace: &Workspace) -> Result<TrustLock> {
    let home = workspace.home().clone();
    let locked = tokio::task::spawn_blocking(move || home.lock_signing());
    locked.await.map_err(|error| Error::new(ErrorKind::Other, error))?
}

/// Whether an entry begins an epoch too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum NextEpoch {
    Begin,
    Stay,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sent {
    Appended,
    Conflict,
}

/// What these signers issued and is in use, but for what belongs to one agent.
fn keep_issued(
    keys: &[IdentityKey],
    members: &[ListedMember],
    open: &[(Signed<Credential>, u32)],
    but: Option<AgentId>,
) -> Result<Vec<ObjectHash>> {
    let mut keep = BTreeSet::new();
    let stays = |member: &&ListedMember| !member.info.revoked && Some(member.info.agent_id) != but;
    for member in members.iter().filter(stays) {
        match (&member.presented.certificate.object().issuer, &member.presented.credential) {
            (Issuer::Signer(signer), _) if keys.contains(signer) => {
                keep.insert(ObjectHash(member.presented.certificate.hash()));
            }
            (Issuer::Credential(_), Some(credential))
                if keys.contains(&credential.object().issuer) =>
            {
                keep.insert(ObjectHash(credential.hash()));
            }
            (Issuer::Signer(_) | Issuer::Credential(_), _) => {}
        }
    }
    // Of a signer that goes without being revoked, invites stay open.
    if but.is_none() {
        let issued =
            open.iter().filter(|(credential, _)| keys.contains(&credential.object().issuer));
        keep.extend(issued.map(|(credential, _)| ObjectHash(credential.hash())));
    }
    if keep.len() > MAX_KEPT {
        return Err(Error::new(
            ErrorKind::Refused,
            format_args!(
                "the signer issued {} certificates and invites that are in use; an entry can keep \
                 {MAX_KEPT}",
                keep.len()
            ),
        ));
    }
    Ok(keep.into_iter().collect())
}

fn is_over(credential: &Credential, used: u32, now: UnixTime) -> bool {
    used >= credential.uses || now > credential.join_until
}

/// The certificates of those who joined by an invite in time: what its closure keeps.
fn joined_by(credential: &Signed<Credential>, members: &[ListedMember]) -> Result<Vec<ObjectHash>> {
    let object = credential.object();
    let mut joined: Vec<_> = members
        .iter()
        .filter(|member| !member.info.revoked && member.joined_at <= object.join_until)
        .filter(|member| {
            let issuer = &member.presented.certificate.object().issuer;
            *issuer == Issuer::Credential(credential.hash())
        })
        .collect();
    joined.sort_by_key(|member| member.joined_at);
    joined.truncate(usize::try_from(object.uses).unwrap_or(usize::MAX));
    if joined.len() > MAX_KEPT {
        return Err(Error::new(ErrorKind::Refused, "more agents joined than one entry can keep"));
    }
    let keep: BTreeSet<_> =
        joined.iter().map(|member| ObjectHash(member.presented.certificate.hash())).collect();
    Ok(keep.into_iter().collect())
}

/// The key by which an agent is a signer: its identity key, or, of a founder, the one that signed its
/// certificate.
fn signer_key(identity: &Identity, agent: &ListedMember) -> Option<IdentityKey> {
    let certificate = agent.presented.certificate.object();
    let own = Some(certificate.identity_key);
    let founder = match certificate.issuer {
        Issuer::Signer(key) if certificate.serial == 1 => Some(key),
        Issuer::Signer(_) | Issuer::Credential(_) => None,
    };
    [own, founder].into_iter().flatten().find(|key| identity.trust.is_signer(key))
}

/// The invites that are not closed.
///
/// # Errors
/// As a request to the hub.
pub async fn invites(directory: &Directory) -> Result<Vec<InviteInfo>> {
    let now = clock::now();
    let open = directory.credentials().await?;
    let invites =
        open.iter().filter(|(credential, _)| credential.object().kind == CredentialKind::Invite);
    let invites = invites.map(|(credential, used)| {
        let object = credential.object();
        InviteInfo {
            id: object.id(),
            uses: object.uses,
            used: *used,
            join_until: object.join_until,
            over: is_over(object, *used, now),
        }
    });
    Ok(invites.collect())
}

/// The trust log for people: who signed what, and when.
///
/// # Errors
/// When the log cannot be read.
pub async fn log(directory: &Directory) -> Result<Vec<EntryInfo>> {
    let workspace = directory.workspace();
    let entries = workspace.with_log(|log| log.all()).await?;
    let identity = workspace.identity();
    let founders = &identity.genesis.object().founders;
    let members = directory.members().await.unwrap_or_default();
    let agent_name = |agent: &AgentId| {
        let member = members.iter().find(|member| member.info.agent_id == *agent);
        member
            .map_or_else(|| agent.to_string(), |member| format!("{} ({agent})", member.info.label))
    };
    let key_name = |key: &IdentityKey| {
        if founders.iter().any(|founder| founder.key == *key) {
            return "founder".to_owned();
        }
        let agent = AgentId::of(&identity.workspace_id(), key);
        let member = members.iter().find(|member| member.info.agent_id == agent);
        member.map_or_else(
            || format!("key {}", hex::encode(&key.0[..8])),
            |member| member.info.label.clone(),
        )
    };
    let described = entries.iter().map(|entry| {
        let head = entry.head();
        let changes = match entry {
            LogEntry::Entry(entry) => entry
                .object()
                .changes
                .iter()
                .map(|change| describe(change, &agent_name, &key_name))
                .chain(
                    entry.object().abandons.iter().map(|first| format!("abandons branch {first}")),
                )
                .collect(),
            LogEntry::Recovery(recovery) => {
                let signers = recovery.object().signers.iter().map(|signer| key_name(&signer.key));
                let signers: Vec<_> = signers.collect();
                vec![format!("recovery by words; signers from here on: {}", signers.join(", "))]
            }
        };
        let by_recovery = matches!(entry, LogEntry::Recovery(_));
        let signed_by = if by_recovery {
            vec!["recovery key".to_owned()]
        } else {
            entry.signed_by().iter().map(key_name).collect()
        };
        EntryInfo { seq: head.seq, hash: head.hash, time: entry.time(), signed_by, changes }
    });
    Ok(described.collect())
}

fn describe(
    change: &Change,
    agent_name: &impl Fn(&AgentId) -> String,
    key_name: &impl Fn(&IdentityKey) -> String,
) -> String {
    let kept = |keep: &[ObjectHash]| match keep.len() {
        0 => "keeps nothing".to_owned(),
        count => format!("keeps {count}"),
    };
    match change {
        Change::AddSigner { key, role } => {
            let role = match role {
                SignerRole::Owner => "owner",
                SignerRole::Admin => "admin",
            };
            format!("adds signer {} as {role}", key_name(key))
        }
        Change::RemoveSigner { key, keep } => {
            format!("removes signer {}, {}", key_name(key), kept(keep))
        }
        Change::RevokeAgent { agent_id, below_serial: None } => {
            format!("revokes agent {}", agent_name(agent_id))
        }
        Change::RevokeAgent { agent_id, below_serial: Some(serial) } => {
            format!("ends certificates of agent {} before number {serial}", agent_name(agent_id))
        }
        Change::CloseCredential { credential_id, keep } => {
            format!("closes invite {credential_id}, {}", kept(keep))
        }
        Change::EpochKey { epoch, .. } => format!("begins epoch {epoch}"),
        Change::Policy(Policy { strict: true }) => "sets the policy: strict".to_owned(),
        Change::Policy(Policy { strict: false }) => "sets the policy: not strict".to_owned(),
        Change::Unknown(number) => format!("change {number}, which this version does not know"),
    }
}

/// Starts the log anew with the recovery words: this agent becomes the only signer, everybody who is a
/// member stays one, and new words take the place of the old ones. They are given to `show` just before
/// they come into force: a crash must not leave words in force that nobody has seen.
///
/// # Errors
/// [`ErrorKind::Refused`] when the words are not those in force.
pub async fn recover(
    directory: &Directory,
    words: &str,
    show: impl FnOnce(&Recovered),
) -> Result<()> {
    let recovery_key = RecoveryKey::from_words(words)
        .map_err(|error| Error::new(ErrorKind::Usage, error).hint("type the 24 words in order"))?;
    let workspace = directory.workspace();
    let _signing = lock(workspace).await?;
    workspace.sync(directory.session()).await?;
    let identity = workspace.identity();
    let (in_force, counter) = identity.trust.recovery();
    if recovery_key.public() != in_force {
        return Err(Error::new(
            ErrorKind::Refused,
            "these are not the recovery words of this workspace that are in force",
        )
        .hint("a recovery replaces them: use those that it printed"));
    }
    let members = directory.members().await?;
    let open = directory.credentials().await?;
    let issuers: Vec<_> = members
        .iter()
        .filter_map(|member| match &member.presented.credential {
            Some(credential) => Some(credential.object().issuer),
            None => match member.presented.certificate.object().issuer {
                Issuer::Signer(key) => Some(key),
                Issuer::Credential(_) => None,
            },
        })
        .chain(open.iter().map(|(credential, _)| credential.object().issuer))
        .collect();
    let keep = keep_issued(&issuers, &members, &open, None)?;
    // By its identity key, so that revoking this agent one day ends the signer too.
    let signer = identity.signing.public();
    let next = RecoveryKey::generate(&mut random::rng());
    let recovery = Recovery {
        workspace_id: identity.workspace_id(),
        counter: counter.saturating_add(1),
        base: identity.trust.head(),
        signers: vec![Founder { key: signer, role: SignerRole::Owner }],
        recovery_key: next.public(),
        keep,
        time: clock::now(),
    };
    let signed =
        recovery_key.sign(&recovery).map_err(|error| Error::new(ErrorKind::Other, error))?;
    let kept = members.iter().filter(|member| !member.info.revoked).count();
    show(&Recovered { recovery_words: next.words(), kept });
    workspace.learn(vec![LogEntry::Recovery(signed)]).await?;
    workspace.sync(directory.session()).await
}

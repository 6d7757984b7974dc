//! The trust log: the signed entries that say who may do what. PROTOCOL.md, "Trust log".
//!
//! This module reads and writes entries; [`crate::trust`] says what they mean.

use serde::{Deserialize, Serialize};

use crate::{
    bytes::hex_newtype,
    cbor::{CborError, Fields, FieldsWriter},
    ids::{AgentId, CredentialId, WorkspaceId},
    keys::{BadSignature, IdentityKey},
    limits::{MAX_ABANDONED, MAX_CHANGES, MAX_ENTRY_BYTES, MAX_KEPT, MAX_SIGNERS},
    objects::{BODY_VERSION, Founder, SignerRole, UnixTime, check_version},
    signed::{Body, ObjectError, Signed},
};

hex_newtype!(
    /// Hash of an entry of the trust log; that of entry 0 is the workspace id.
    EntryHash,
    32
);
hex_newtype!(
    /// Hash of a certificate's or a credential's body: [`Signed::hash`].
    ObjectHash,
    32
);

/// A place in the trust log: how many entries follow the genesis, and the hash of the last one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Head {
    /// Number of the last entry; the genesis is 0.
    pub seq: u64,
    /// Its hash.
    pub hash: EntryHash,
}

impl Head {
    /// The head of a log that holds the genesis alone.
    #[must_use]
    pub fn genesis(workspace: WorkspaceId) -> Self {
        Self { seq: 0, hash: EntryHash(workspace.0) }
    }
}

/// One thing that an entry changes. All changes of an entry apply, in their order, or none does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Makes a key a signer, or gives a signer another role. By owners.
    AddSigner {
        /// The key. That of an agent's identity makes the agent a signer.
        key: IdentityKey,
        /// What it may do.
        role: SignerRole,
    },
    /// Ends a signer from here on. By owners.
    RemoveSigner {
        /// The key.
        key: IdentityKey,
        /// What it issued and stays valid; all else that bears its signature does not, however it is
        /// dated. Ascending.
        keep: Vec<ObjectHash>,
    },
    /// Ends an agent, and the signer that its identity key may be, or only older certificates of the
    /// agent. By signers; where its identity key is an owner, by owners.
    RevokeAgent {
        /// The agent.
        agent_id: AgentId,
        /// Only its certificates with a lower serial; `None`: all that it has and will ever have.
        below_serial: Option<u64>,
    },
    /// Ends a credential: nobody joins by it any more. By signers.
    CloseCredential {
        /// The credential.
        credential_id: CredentialId,
        /// Certificates made under it that stay valid, for members without end. Ascending.
        keep: Vec<ObjectHash>,
    },
    /// Begins an epoch. By signers.
    EpochKey {
        /// The next number.
        epoch: u32,
        /// `H("epoch", M || W)`.
        commit: [u8; 32],
    },
    /// Replaces the policy of the workspace. By owners.
    Policy(Policy),
    /// A change of a newer version. Below [`FIRST_OPTIONAL_CHANGE`] it is critical: what this version
    /// makes of the log ends before it.
    Unknown(u64),
}

/// What a workspace demands of its agents beyond the rules.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// Refuse new tunnels, rather than warn: without a fresh beat, in a fork, and to a name that
    /// another agent took over.
    pub strict: bool,
}

/// Changes with this number and above may be ignored by a version that does not know them.
pub const FIRST_OPTIONAL_CHANGE: u64 = 128;

mod number {
    pub(super) const ADD_SIGNER: u64 = 1;
    pub(super) const REMOVE_SIGNER: u64 = 2;
    pub(super) const REVOKE_AGENT: u64 = 3;
    pub(super) const CLOSE_CREDENTIAL: u64 = 4;
    pub(super) const EPOCH_KEY: u64 = 5;
    pub(super) const POLICY: u64 = 6;
}

/// Hashes, strictly ascending, as every list of them in a signed body is.
fn ascending<T: Ord>(key: u64, hashes: Vec<T>) -> Result<Vec<T>, ObjectError> {
    if hashes.is_sorted_by(|left, right| left < right) {
        Ok(hashes)
    } else {
        Err(ObjectError::Value(key))
    }
}

fn read_kept(fields: &mut Fields<'_>, key: u64) -> Result<Vec<ObjectHash>, ObjectError> {
    let kept = fields.optional_fixed_array(key, MAX_KEPT)?.ok_or(CborError::Missing(key))?;
    ascending(key, kept)
}

fn write_kept(map: FieldsWriter, key: u64, keep: &[ObjectHash]) -> FieldsWriter {
    map.byte_strings(key, keep.iter().map(|hash| hash.0.as_slice()))
}

impl Change {
    fn read(mut fields: Fields<'_>) -> Result<Self, ObjectError> {
        let kind = fields.uint(0)?;
        let change = match kind {
            number::ADD_SIGNER => Self::AddSigner {
                key: fields.fixed(1)?,
                role: SignerRole::from_number(fields.uint(2)?).ok_or(ObjectError::Value(2))?,
            },
            number::REMOVE_SIGNER => {
                Self::RemoveSigner { key: fields.fixed(1)?, keep: read_kept(&mut fields, 2)? }
            }
            number::REVOKE_AGENT => Self::RevokeAgent {
                agent_id: fields.fixed(1)?,
                below_serial: fields.optional_uint(2)?,
            },
            number::CLOSE_CREDENTIAL => Self::CloseCredential {
                credential_id: fields.fixed(1)?,
                keep: read_kept(&mut fields, 2)?,
            },
            number::EPOCH_KEY => {
                Self::EpochKey { epoch: fields.uint(1)?, commit: fields.fixed(2)? }
            }
            number::POLICY => Self::Policy(Policy {
                strict: fields.optional_bool(1)?.ok_or(CborError::Missing(1))?,
            }),
            unknown => return Ok(Self::Unknown(unknown)),
        };
        // A critical field that is not known here makes another change of it.
        Ok(if fields.finish().is_ok() { change } else { Self::Unknown(kind) })
    }

    fn write(&self) -> FieldsWriter {
        let kind = |number: u64| FieldsWriter::new().uint(0, number);
        match self {
            Self::AddSigner { key, role } => {
                kind(number::ADD_SIGNER).bytes(1, &key.0).uint(2, role.number())
            }
            Self::RemoveSigner { key, keep } => {
                write_kept(kind(number::REMOVE_SIGNER).bytes(1, &key.0), 2, keep)
            }
            Self::RevokeAgent { agent_id, below_serial } => kind(number::REVOKE_AGENT)
                .bytes(1, &agent_id.0)
                .optional(*below_serial, |map, serial| map.uint(2, serial)),
            Self::CloseCredential { credential_id, keep } => {
                write_kept(kind(number::CLOSE_CREDENTIAL).bytes(1, &credential_id.0), 2, keep)
            }
            Self::EpochKey { epoch, commit } => {
                kind(number::EPOCH_KEY).uint(1, *epoch).bytes(2, commit)
            }
            Self::Policy(policy) => kind(number::POLICY).bool(1, policy.strict),
            Self::Unknown(number) => kind(*number),
        }
    }

    /// Whether a reader that does not know the change must not go on past it.
    #[must_use]
    pub fn is_unknown_critical(&self) -> bool {
        matches!(self, Self::Unknown(number) if *number < FIRST_OPTIONAL_CHANGE)
    }
}

/// An ordinary entry of the log, signed by one or more signers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The workspace.
    pub workspace_id: WorkspaceId,
    /// One more than that of the entry before.
    pub seq: u64,
    /// The entry before.
    pub prev: EntryHash,
    /// When it was signed, as its signer's clock said. Informational.
    pub time: UnixTime,
    /// 1 to 16 changes.
    pub changes: Vec<Change>,
    /// First entries of branches that this entry ends, where the log forked. By owners. Ascending.
    pub abandons: Vec<EntryHash>,
}

impl Body for Entry {
    const KIND: &'static str = "entry";
    const MAX_BYTES: usize = MAX_ENTRY_BYTES;

    fn decode(body: &[u8]) -> Result<Self, ObjectError> {
        let mut fields = Fields::decode(body)?;
        check_version(&mut fields)?;
        let entry = Self {
            workspace_id: fields.fixed(1)?,
            seq: fields.uint(2)?,
            prev: fields.fixed(3)?,
            time: fields.uint(4)?,
            changes: fields
                .maps(5, MAX_CHANGES)?
                .into_iter()
                .map(Change::read)
                .collect::<Result<_, _>>()?,
            abandons: match fields.optional_fixed_array(6, MAX_ABANDONED)? {
                // Absent, never empty: one spelling.
                Some(none) if none.is_empty() => return Err(ObjectError::Value(6)),
                Some(abandons) => ascending(6, abandons)?,
                None => Vec::new(),
            },
        };
        if entry.seq == 0 {
            return Err(ObjectError::Value(2));
        }
        if entry.changes.is_empty() {
            return Err(ObjectError::Value(5));
        }
        fields.finish()?;
        Ok(entry)
    }

    fn encode(&self) -> Vec<u8> {
        let abandons = Some(&self.abandons).filter(|abandons| !abandons.is_empty());
        FieldsWriter::new()
            .uint(0, BODY_VERSION)
            .bytes(1, &self.workspace_id.0)
            .uint(2, self.seq)
            .bytes(3, &self.prev.0)
            .uint(4, self.time)
            .maps(5, self.changes.iter().map(Change::write))
            .optional(abandons, |map, abandons| {
                map.byte_strings(6, abandons.iter().map(|hash| hash.0.as_slice()))
            })
            .finish()
    }
}

/// The entry by which the recovery key starts the log anew: it follows `base` and names every signer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recovery {
    /// The workspace.
    pub workspace_id: WorkspaceId,
    /// Above that of every recovery before.
    pub counter: u64,
    /// The entry that it follows; what was signed after that one is void, but for revocations.
    pub base: Head,
    /// All signers from here on, at least one owner, by ascending key.
    pub signers: Vec<Founder>,
    /// The recovery key from here on.
    pub recovery_key: IdentityKey,
    /// What earlier signers issued and stays valid. Ascending.
    pub keep: Vec<ObjectHash>,
    /// When it was signed. Informational.
    pub time: UnixTime,
}

impl Body for Recovery {
    const KIND: &'static str = "recovery";
    const MAX_BYTES: usize = MAX_ENTRY_BYTES;

    fn decode(body: &[u8]) -> Result<Self, ObjectError> {
        let mut fields = Fields::decode(body)?;
        check_version(&mut fields)?;
        let recovery = Self {
            workspace_id: fields.fixed(1)?,
            counter: fields.uint(2)?,
            base: Head { seq: fields.uint(3)?, hash: fields.fixed(4)? },
            signers: Founder::read_all(&mut fields, 5, MAX_SIGNERS)?,
            recovery_key: fields.fixed(6)?,
            keep: read_kept(&mut fields, 7)?,
            time: fields.uint(8)?,
        };
        if recovery.counter == 0 {
            return Err(ObjectError::Value(2));
        }
        fields.finish()?;
        Ok(recovery)
    }

    fn encode(&self) -> Vec<u8> {
        let map = FieldsWriter::new()
            .uint(0, BODY_VERSION)
            .bytes(1, &self.workspace_id.0)
            .uint(2, self.counter)
            .uint(3, self.base.seq)
            .bytes(4, &self.base.hash.0)
            .maps(5, self.signers.iter().map(Founder::write))
            .bytes(6, &self.recovery_key.0);
        write_kept(map, 7, &self.keep).uint(8, self.time).finish()
    }
}

/// One entry of the log as it travels and as it is stored: `kind u8 || signed object`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogEntry {
    /// Kind 1.
    Entry(Signed<Entry>),
    /// Kind 2.
    Recovery(Signed<Recovery>),
}

const WIRE_ENTRY: u8 = 1;
const WIRE_RECOVERY: u8 = 2;

impl LogEntry {
    /// Reads an entry; nothing of it is verified yet.
    ///
    /// # Errors
    /// [`ObjectError`]: every deviation from the one allowed spelling.
    pub fn decode(wire: &[u8]) -> Result<Self, ObjectError> {
        match wire.split_first() {
            Some((&WIRE_ENTRY, rest)) => Signed::decode(rest).map(Self::Entry),
            Some((&WIRE_RECOVERY, rest)) => Signed::decode(rest).map(Self::Recovery),
            Some(_) | None => Err(ObjectError::Envelope),
        }
    }

    /// Writes the entry as it travels.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let (kind, signed) = match self {
            Self::Entry(entry) => (WIRE_ENTRY, entry.encode()),
            Self::Recovery(recovery) => (WIRE_RECOVERY, recovery.encode()),
        };
        [&[kind], signed.as_slice()].concat()
    }

    /// `H("entry", body)` or `H("recovery", body)`: the same whoever signed it.
    #[must_use]
    pub fn hash(&self) -> EntryHash {
        EntryHash(match self {
            Self::Entry(entry) => entry.hash(),
            Self::Recovery(recovery) => recovery.hash(),
        })
    }

    /// Its place in the log.
    #[must_use]
    pub fn head(&self) -> Head {
        let seq = match self {
            Self::Entry(entry) => entry.object().seq,
            Self::Recovery(recovery) => recovery.object().base.seq.saturating_add(1),
        };
        Head { seq, hash: self.hash() }
    }

    /// The place that it follows.
    #[must_use]
    pub fn follows(&self) -> Head {
        match self {
            Self::Entry(entry) => {
                let entry = entry.object();
                // An entry's number is never 0.
                Head { seq: entry.seq.saturating_sub(1), hash: entry.prev }
            }
            Self::Recovery(recovery) => recovery.object().base,
        }
    }

    /// Who signed it, by ascending key. Nothing is verified by asking.
    #[must_use]
    pub fn signed_by(&self) -> Vec<IdentityKey> {
        let signatures = match self {
            Self::Entry(entry) => entry.signatures(),
            Self::Recovery(recovery) => recovery.signatures(),
        };
        signatures.iter().map(|(key, _)| *key).collect()
    }

    /// When it was signed, as its signer's clock said.
    #[must_use]
    pub fn time(&self) -> UnixTime {
        match self {
            Self::Entry(entry) => entry.object().time,
            Self::Recovery(recovery) => recovery.object().time,
        }
    }

    /// The workspace that it is for.
    #[must_use]
    pub fn workspace_id(&self) -> WorkspaceId {
        match self {
            Self::Entry(entry) => entry.object().workspace_id,
            Self::Recovery(recovery) => recovery.object().workspace_id,
        }
    }

    /// Length of the body in bytes.
    pub(crate) fn body_bytes(&self) -> usize {
        match self {
            Self::Entry(entry) => entry.body().len(),
            Self::Recovery(recovery) => recovery.body().len(),
        }
    }

    pub(crate) fn verify_all(&self) -> Result<(), BadSignature> {
        match self {
            Self::Entry(entry) => entry.verify_all(),
            Self::Recovery(recovery) => recovery.verify_all(),
        }
    }
}

/// What a witness says of the log: "this is the head that I know, now".
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Beat {
    /// The workspace.
    pub workspace_id: WorkspaceId,
    /// The witness.
    pub agent_id: AgentId,
    /// The head that it knows.
    pub head: Head,
    /// Its clock. Only compared with other times of the same witness.
    pub time: UnixTime,
}

impl Body for Beat {
    const KIND: &'static str = "beat";
    const MAX_BYTES: usize = 256;

    fn decode(body: &[u8]) -> Result<Self, ObjectError> {
        let mut fields = Fields::decode(body)?;
        check_version(&mut fields)?;
        let beat = Self {
            workspace_id: fields.fixed(1)?,
            agent_id: fields.fixed(2)?,
            head: Head { seq: fields.uint(3)?, hash: fields.fixed(4)? },
            time: fields.uint(5)?,
        };
        fields.finish()?;
        Ok(beat)
    }

    fn encode(&self) -> Vec<u8> {
        FieldsWriter::new()
            .uint(0, BODY_VERSION)
            .bytes(1, &self.workspace_id.0)
            .bytes(2, &self.agent_id.0)
            .uint(3, self.head.seq)
            .bytes(4, &self.head.hash.0)
            .uint(5, self.time)
            .finish()
    }
}

/// The places of the own log that are named to a peer, newest first, so that it finds the last one that
/// both logs have: the head, and those that are 1, 2, 4, 8 … before it.
///
/// At most [`crate::limits::MAX_LOCATOR`] of them. Entry 0 is common to all and not named.
#[must_use]
pub fn locator(head: u64) -> Vec<u64> {
    let mut places = Vec::new();
    let mut seq = head;
    let mut step = 1;
    while seq > 0 {
        places.push(seq);
        seq = seq.saturating_sub(step);
        if places.len() > 1 {
            step = step.saturating_mul(2);
        }
    }
    places
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::{MAX_LOCATOR, MAX_LOG_ENTRIES};

    #[test]
    fn locators_are_short_and_reach_the_beginning() {
        assert_eq!(locator(0), [0_u64; 0]);
        assert_eq!(locator(1), [1]);
        assert_eq!(locator(10), [10, 9, 8, 6, 2]);
        assert!(locator(MAX_LOG_ENTRIES).len() <= MAX_LOCATOR);
        assert_eq!(locator(u64::MAX).len(), 65);
    }
}

//! The audit log of a workspace: what the hub saw happen, in a chain of hashes. PROTOCOL.md, "Audit log".
//!
//! The hub writes it, so it may leave out what happened and write what did not; it cannot change or take
//! back what somebody has seen. Whoever reads all rows and remembers the last one finds any later change
//! of them with [`Chain`].

use std::{collections::BTreeMap, time::Duration};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::{
    bytes::hex_newtype,
    control::ErrorCode,
    ids::{AgentId, CredentialId, ServiceId, TunnelId, WorkspaceId},
    keys::IdentityKey,
    limits::{CLOCK_TOLERANCE, MIN_AUDIT_RETENTION},
    objects::{AgentRole, SignerRole, UnixTime},
};

hex_newtype!(
    /// SHA-256 that chains a row to the one before it: [`link`]. Not the protocol's own hash, so that
    /// PostgreSQL can compute it, and an auditor who has nothing else.
    AuditHash,
    32
);
hex_newtype!(
    /// The first 16 bytes of SHA-256 of an API key: its name in lists and events.
    ApiKeyId,
    16
);

/// A place in an audit log: how many rows were ever written, and the hash of the last of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditHead {
    /// Number of the last row; 0 before the first.
    pub seq: u64,
    /// Its hash; zeros before the first.
    pub hash: AuditHash,
}

impl AuditHead {
    /// The head of a log without rows.
    pub const EMPTY: Self = Self { seq: 0, hash: AuditHash([0; 32]) };
}

/// Where an audit log ended, as an agent remembers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeenHead {
    /// The place.
    #[serde(flatten)]
    pub head: AuditHead,
    /// When the hub last named it as the end, by the clock of whoever was told: what comes after it was
    /// written later. 0 when that is not known.
    #[serde(default)]
    pub at: UnixTime,
}

/// One row, as the hub keeps it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditRow {
    /// Numbers ascend by one from 1.
    pub seq: u64,
    /// [`link`] of this row.
    pub hash: AuditHash,
    /// [`Recorded`] as JSON, byte for byte as it was hashed.
    pub event: String,
}

/// An event and when the hub saw it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recorded {
    /// Milliseconds since 1970, by the hub's clock.
    pub at: u64,
    /// What happened.
    #[serde(flatten)]
    pub event: Event,
}

impl Recorded {
    /// The text that is stored and hashed: JSON without white space, keys in ascending order. Values are
    /// numbers, ASCII strings and lists of them, so most JSON libraries write the same when told to.
    #[must_use]
    pub fn encode(&self) -> String {
        let fields: BTreeMap<String, serde_json::Value> = serde_json::to_value(self)
            .and_then(serde_json::from_value)
            .expect("events are objects of plain data");
        serde_json::to_string(&fields).expect("plain data becomes JSON")
    }
}

/// Why a tunnel ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TunnelEnd {
    /// The reacher closed it.
    ReacherClosed,
    /// The exposer closed it.
    ExposerClosed,
    /// The reacher's socket broke.
    ReacherGone,
    /// The exposer's socket broke.
    ExposerGone,
    /// An end broke the rules of its socket.
    Violation,
    /// Neither end said anything for a long time.
    Idle,
    /// An end was revoked.
    Revoked,
    /// An end slept, moved to another network, or was started again, and said so.
    Moved,
    /// It was cut by an API key.
    Cut,
    /// The hub was stopped.
    HubStopped,
    /// A reason of a newer version.
    #[serde(other)]
    Unknown,
}

/// What an API key may do. A key may have several.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// List services, agents, tunnels and shares.
    Read,
    /// Read the audit log.
    Audit,
    /// Cut tunnels.
    Write,
}

/// What happened. Flat, so that each field is a column for whoever exports it.
///
/// `agent_id` is who acted, `peer_id` with whom; names are nowhere, and addresses are networks (/24 of
/// IPv4, /48 of IPv6).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Event {
    /// The workspace began at this hub.
    WorkspaceCreated {
        /// Who created it.
        agent_id: AgentId,
        /// Whether a registration token was spent.
        by_token: bool,
        /// Where the agent was, masked.
        address: String,
    },
    /// An agent logged in for the first time.
    AgentEnrolled {
        /// Which.
        agent_id: AgentId,
        /// By its certificate.
        role: AgentRole,
        /// The invite or share that it joined by; none for the founder.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        credential_id: Option<CredentialId>,
        /// Where it was, masked.
        address: String,
    },
    /// A login of an agent that this workspace knows was refused.
    LoginRefused {
        /// Which.
        agent_id: AgentId,
        /// Why.
        code: ErrorCode,
        /// How many within a short time.
        count: u64,
        /// Where it was, masked.
        address: String,
    },
    /// An agent came with a new static key.
    KeyRotated {
        /// Which.
        agent_id: AgentId,
        /// Of its NoiseKey.
        counter: u64,
    },
    /// A signer left a new certificate for an agent.
    CertificateIssued {
        /// Who brought it.
        agent_id: AgentId,
        /// Whom it is for.
        peer_id: AgentId,
        /// Of the certificate.
        serial: u64,
    },
    /// An invite was made.
    InviteCreated {
        /// Who brought it.
        agent_id: AgentId,
        /// Its id.
        credential_id: CredentialId,
        /// How many may join.
        uses: u32,
        /// Until when.
        join_until: UnixTime,
    },
    /// A share was made.
    ShareCreated {
        /// Who brought it.
        agent_id: AgentId,
        /// Its id.
        credential_id: CredentialId,
        /// What it lets reach.
        service_ids: Vec<ServiceId>,
        /// Until when.
        certs_end: UnixTime,
    },
    /// A service is offered, or offered anew with another record.
    ServiceExposed {
        /// By whom.
        agent_id: AgentId,
        /// Which.
        service_id: ServiceId,
    },
    /// A service is offered no longer.
    ServiceUnexposed {
        /// By whom.
        agent_id: AgentId,
        /// Which.
        service_id: ServiceId,
    },
    /// The name of an agent that was offline went to another.
    NameTaken {
        /// Who has it now.
        agent_id: AgentId,
        /// Who had it.
        peer_id: AgentId,
        /// What it stands for now.
        service_id: ServiceId,
    },
    /// Both ends of a tunnel are here.
    TunnelOpened {
        /// The reacher.
        agent_id: AgentId,
        /// The exposer.
        peer_id: AgentId,
        /// To which service.
        service_id: ServiceId,
        /// Which.
        tunnel_id: TunnelId,
        /// The share of a guest.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        share_id: Option<CredentialId>,
    },
    /// A tunnel is over.
    TunnelClosed {
        /// The reacher.
        agent_id: AgentId,
        /// The exposer.
        peer_id: AgentId,
        /// To which service.
        service_id: ServiceId,
        /// Which.
        tunnel_id: TunnelId,
        /// How long it was open.
        duration_ms: u64,
        /// What the reacher sent: bytes of packets, as the hub forwards them.
        bytes_from_agent: u64,
        /// What the exposer sent.
        bytes_from_peer: u64,
        /// Why it ended.
        reason: TunnelEnd,
    },
    /// A tunnel was asked for and did not come to be.
    TunnelRefused {
        /// Who asked.
        agent_id: AgentId,
        /// Who was to answer.
        peer_id: AgentId,
        /// For which service.
        service_id: ServiceId,
        /// Why.
        code: ErrorCode,
        /// How many within a short time.
        count: u64,
    },
    /// An API key cut a tunnel.
    TunnelCut {
        /// The key.
        key_id: ApiKeyId,
        /// Which.
        tunnel_id: TunnelId,
    },
    /// The trust log ended an agent.
    AgentRevoked {
        /// Whom.
        agent_id: AgentId,
        /// Of the entry.
        entry: u64,
        /// Only its certificates below this serial.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        below_serial: Option<u64>,
    },
    /// The trust log closed an invite or a share.
    CredentialClosed {
        /// Which.
        credential_id: CredentialId,
        /// Of the entry.
        entry: u64,
        /// How many that joined by it stay.
        kept: u64,
    },
    /// The trust log named a signer, or gave one another role.
    SignerAdded {
        /// Its key.
        key: IdentityKey,
        /// What it may do.
        role: SignerRole,
        /// Of the entry.
        entry: u64,
    },
    /// The trust log ended a signer.
    SignerRemoved {
        /// Its key.
        key: IdentityKey,
        /// Of the entry.
        entry: u64,
    },
    /// An epoch of the secrets began.
    EpochBegan {
        /// Which.
        epoch: u32,
        /// Of the entry.
        entry: u64,
    },
    /// The policy of the workspace changed.
    PolicySet {
        /// Whether it is strict.
        strict: bool,
        /// Of the entry.
        entry: u64,
    },
    /// The recovery words were used.
    Recovered {
        /// Of the entry.
        entry: u64,
    },
    /// The end of the trust log was replaced, by a recovery or by an owner who settled a fork.
    LogReplaced {
        /// The last entry that stayed.
        base: u64,
    },
    /// An agent made an API key.
    ApiKeyCreated {
        /// Who.
        agent_id: AgentId,
        /// Which.
        key_id: ApiKeyId,
        /// What it may do.
        scopes: Vec<Scope>,
        /// Until when.
        expires_at: UnixTime,
    },
    /// An API key was revoked.
    ApiKeyRevoked {
        /// By whom; for keys of an agent that is a member no more, that agent.
        agent_id: AgentId,
        /// Which.
        key_id: ApiKeyId,
    },
    /// Rows were removed because they are older than the hub keeps them.
    AuditExpired {
        /// The last that was removed.
        through: u64,
    },
    /// The database was away for so long that events could not be kept.
    EventsLost {
        /// How many.
        count: u64,
    },
    /// An event of a newer version.
    #[serde(other)]
    Unknown,
}

/// The ids in an event that have names.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EventIds {
    /// Who acted.
    pub agent: Option<AgentId>,
    /// With whom.
    pub peer: Option<AgentId>,
    /// About which service.
    pub service: Option<ServiceId>,
}

impl Event {
    /// The ids in it that have names.
    #[must_use]
    pub fn ids(&self) -> EventIds {
        let fields = serde_json::to_value(self).unwrap_or_default();
        let field = |name: &str| fields.get(name).and_then(serde_json::Value::as_str);
        EventIds {
            agent: field("agent_id").and_then(|id| id.parse().ok()),
            peer: field("peer_id").and_then(|id| id.parse().ok()),
            service: field("service_id").and_then(|id| id.parse().ok()),
        }
    }
}

/// The hash of a row:
/// `SHA-256("connect/v1 audit" || 0x00 || workspace_id 32 || seq u64 || previous hash 32 || event)`.
#[must_use]
pub fn link(workspace: &WorkspaceId, previous: &AuditHash, seq: u64, event: &str) -> AuditHash {
    let mut hasher = Sha256::new();
    hasher.update(b"connect/v1 audit\0");
    hasher.update(workspace.0);
    hasher.update(seq.to_be_bytes());
    hasher.update(previous.0);
    hasher.update(event.as_bytes());
    AuditHash(hasher.finalize().into())
}

/// What is wrong with an audit log, at the first row where it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AuditFault {
    /// The row is not there, and a later one is, or the log claims that it has it.
    #[error("row {0} is missing")]
    Missing(u64),
    /// The row is not what was written: it, its number or its workspace was changed.
    #[error("row {0} was changed")]
    Changed(u64),
    /// There are rows beyond the last one that the log claims.
    #[error("row {0} is beyond the end of the log")]
    Beyond(u64),
    /// The row has another hash than it had when it was seen before: it, or one before it, was written
    /// anew.
    #[error("row {0}, or one before it, is not what this agent saw before")]
    Rewritten(u64),
    /// The log is shorter than it was when it was seen before.
    #[error("the log ends before row {0}, which this agent saw before")]
    Shortened(u64),
    /// Rows up to this one are gone, and no row says that they were too old, or not all of them can have been.
    #[error("the rows up to {0} were removed, and not for their age")]
    Removed(u64),
}

/// Follows an audit log row by row.
#[derive(Debug, Clone)]
pub struct Chain {
    workspace: WorkspaceId,
    base: AuditHead,
    head: AuditHead,
    seen: Vec<SeenHead>,
    expired: u64,
}

impl Chain {
    /// Begins after `base`: [`AuditHead::EMPTY`], or the last row that was removed for its age. `seen` are
    /// heads that were remembered, in any order, by the clock that says `now`.
    ///
    /// # Errors
    /// [`AuditFault::Rewritten`] when `base` is a row that was seen, and another one;
    /// [`AuditFault::Removed`] when a row up to `base` was written after one was seen to be the last, not so
    /// long ago.
    pub fn new(
        workspace: WorkspaceId,
        base: AuditHead,
        seen: Vec<SeenHead>,
        now: UnixTime,
    ) -> Result<Self, AuditFault> {
        let is_young = |seen: &SeenHead| {
            let age = now.checked_sub(seen.at).map(Duration::from_secs);
            age.is_some_and(|age| age.saturating_add(CLOCK_TOLERANCE) < MIN_AUDIT_RETENTION)
        };
        if seen.iter().any(|seen| seen.head.seq < base.seq && is_young(seen)) {
            return Err(AuditFault::Removed(base.seq));
        }
        let chain = Self { workspace, base, head: base, seen, expired: 0 };
        if base.seq == 0 && base.hash != AuditHead::EMPTY.hash {
            return Err(AuditFault::Rewritten(0));
        }
        chain.check_seen()?;
        Ok(chain)
    }

    fn check_seen(&self) -> Result<(), AuditFault> {
        let differs = |SeenHead { head, .. }: &SeenHead| {
            head.seq == self.head.seq && head.hash != self.head.hash
        };
        if self.seen.iter().any(differs) {
            return Err(AuditFault::Rewritten(self.head.seq));
        }
        Ok(())
    }

    /// The last row so far.
    #[must_use]
    pub fn head(&self) -> AuditHead {
        self.head
    }

    /// Takes the next row and reads its event.
    ///
    /// # Errors
    /// [`AuditFault`], at this row or one that should have come before it.
    pub fn next(&mut self, row: &AuditRow) -> Result<Recorded, AuditFault> {
        let expected = self.head.seq.saturating_add(1);
        if row.seq != expected {
            return Err(if row.seq > expected {
                AuditFault::Missing(expected)
            } else {
                AuditFault::Changed(row.seq)
            });
        }
        let hash = link(&self.workspace, &self.head.hash, row.seq, &row.event);
        let Ok(recorded) = serde_json::from_str::<Recorded>(&row.event) else {
            return Err(AuditFault::Changed(row.seq));
        };
        if hash != row.hash {
            return Err(AuditFault::Changed(row.seq));
        }
        self.head = AuditHead { seq: row.seq, hash };
        if let Event::AuditExpired { through } = recorded.event {
            // It speaks of rows that were there before it, or others could be removed on its word later.
            self.expired = self.expired.max(through.min(row.seq - 1));
        }
        self.check_seen()?;
        Ok(recorded)
    }

    /// All rows were taken: `head` is where the log says that it ends. More may be taken later.
    ///
    /// # Errors
    /// [`AuditFault`].
    pub fn check_end(&self, head: AuditHead) -> Result<(), AuditFault> {
        if head.seq > self.head.seq {
            return Err(AuditFault::Missing(self.head.seq + 1));
        }
        if head.seq < self.head.seq {
            return Err(AuditFault::Beyond(head.seq + 1));
        }
        if head.hash != self.head.hash {
            return Err(AuditFault::Changed(head.seq));
        }
        if let Some(seen) = self.seen.iter().map(|seen| seen.head.seq).find(|seq| *seq > head.seq) {
            return Err(AuditFault::Shortened(seen));
        }
        // What was removed before it was ever seen must at least be said to be gone.
        if self.base.seq > self.expired {
            return Err(AuditFault::Removed(self.base.seq));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORKSPACE: WorkspaceId = WorkspaceId([7; 32]);
    const NOW: UnixTime = 1_700_000_000;

    fn event(number: u8) -> String {
        let event = Event::ServiceExposed {
            agent_id: AgentId([number; 16]),
            service_id: ServiceId([1; 16]),
        };
        Recorded { at: 1_700_000_000_000 + u64::from(number), event }.encode()
    }

    fn append(rows: &mut Vec<AuditRow>, base: AuditHead, event: String) {
        let last = rows.last().map_or(base, |row| AuditHead { seq: row.seq, hash: row.hash });
        let seq = last.seq + 1;
        rows.push(AuditRow { seq, hash: link(&WORKSPACE, &last.hash, seq, &event), event });
    }

    fn log(length: u8) -> Vec<AuditRow> {
        let mut rows = Vec::new();
        for number in 0..length {
            append(&mut rows, AuditHead::EMPTY, event(number));
        }
        rows
    }

    fn head(rows: &[AuditRow]) -> AuditHead {
        rows.last().map_or(AuditHead::EMPTY, |row| AuditHead { seq: row.seq, hash: row.hash })
    }

    fn check(
        rows: &[AuditRow],
        base: AuditHead,
        end: AuditHead,
        seen: Option<AuditHead>,
    ) -> Result<AuditHead, AuditFault> {
        let seen = seen.into_iter().map(|head| SeenHead { head, at: 0 }).collect();
        let mut chain = Chain::new(WORKSPACE, base, seen, NOW)?;
        for row in rows {
            chain.next(row)?;
        }
        chain.check_end(end)?;
        Ok(chain.head())
    }

    #[test]
    fn events_have_this_text() {
        assert_eq!(
            event(2),
            "{\"agent_id\":\"02020202020202020202020202020202\",\"at\":1700000000002,\
             \"kind\":\"service_exposed\",\"service_id\":\"01010101010101010101010101010101\"}"
        );
        let first = link(&WORKSPACE, &AuditHash([0; 32]), 1, "{}");
        // By Python's hashlib.
        assert_eq!(
            first.to_string(),
            "e19db12ac8be3edfd00726463039c9afd4a49cb44e995343dab232b9a9ecaa79"
        );
    }

    #[test]
    fn a_later_kind_is_read_and_changes_nothing() {
        let recorded: Recorded =
            serde_json::from_str("{\"at\":1,\"kind\":\"new\",\"x\":2}").unwrap();
        assert_eq!(recorded.event, Event::Unknown);
    }

    #[test]
    fn whatever_is_done_to_a_row_is_found_there() {
        let rows = log(9);
        let end = head(&rows);
        let whole = |rows: &[AuditRow]| check(rows, AuditHead::EMPTY, end, None);
        assert_eq!(whole(&rows), Ok(end));
        for at in 0..rows.len() {
            let seq = at as u64 + 1;
            let mut gone = rows.clone();
            gone.remove(at);
            assert_eq!(whole(&gone), Err(AuditFault::Missing(seq)));

            let mut edited = rows.clone();
            edited[at].event = event(77);
            assert_eq!(whole(&edited), Err(AuditFault::Changed(seq)));

            let mut hash = rows.clone();
            hash[at].hash.0[3] ^= 1;
            assert_eq!(whole(&hash), Err(AuditFault::Changed(seq)));

            let mut garbled = rows.clone();
            garbled[at].event.push(' ');
            assert_eq!(whole(&garbled), Err(AuditFault::Changed(seq)));

            for other in at + 1..rows.len() {
                let mut swapped = rows.clone();
                let (left, right) = (rows[at].event.clone(), rows[other].event.clone());
                (swapped[at].event, swapped[other].event) = (right, left);
                assert_eq!(whole(&swapped), Err(AuditFault::Changed(seq)));
            }
            assert_eq!(whole(&rows[..at]), Err(AuditFault::Missing(seq)));
        }
        assert_eq!(
            check(&rows, AuditHead::EMPTY, head(&rows[..5]), None),
            Err(AuditFault::Beyond(6))
        );
        let mut other = end;
        other.hash.0[0] ^= 1;
        assert_eq!(check(&rows, AuditHead::EMPTY, other, None), Err(AuditFault::Changed(9)));
    }

    #[test]
    fn rows_of_another_workspace_are_not_taken() {
        let rows = log(2);
        let mut chain =
            Chain::new(WorkspaceId([8; 32]), AuditHead::EMPTY, Vec::new(), NOW).unwrap();
        assert_eq!(chain.next(&rows[0]), Err(AuditFault::Changed(1)));
    }

    #[test]
    fn a_log_that_was_written_anew_is_known_by_who_saw_it() {
        let rows = log(9);
        let seen = Some(head(&rows[..4]));
        let mut anew = rows[..2].to_vec();
        for number in 40..47 {
            append(&mut anew, AuditHead::EMPTY, event(number));
        }
        let check_all = |rows: &[AuditRow], seen| check(rows, AuditHead::EMPTY, head(rows), seen);
        assert_eq!(check_all(&rows, seen), Ok(head(&rows)));
        assert_eq!(check_all(&anew, None), Ok(head(&anew)));
        assert_eq!(check_all(&anew, seen), Err(AuditFault::Rewritten(4)));
        assert_eq!(check_all(&rows[..3], seen), Err(AuditFault::Shortened(4)));
    }

    #[test]
    fn rows_are_removed_for_their_age_only() {
        let mut rows = log(9);
        let base = head(&rows[..4]);
        let kept = &rows[4..];
        assert_eq!(check(kept, base, head(kept), None), Err(AuditFault::Removed(4)));

        let expired = Recorded { at: 9, event: Event::AuditExpired { through: 4 } }.encode();
        append(&mut rows, AuditHead::EMPTY, expired);
        let kept = &rows[4..];
        assert_eq!(check(kept, base, head(kept), None), Ok(head(kept)));
        // Seen before, at the base, beyond it, and in what is gone.
        for seen in [4, 7, 2] {
            assert_eq!(check(kept, base, head(kept), Some(head(&rows[..seen]))), Ok(head(kept)));
        }
        let other = AuditHead { hash: AuditHash([9; 32]), ..base };
        assert_eq!(check(kept, other, head(kept), Some(base)), Err(AuditFault::Rewritten(4)));
        assert_eq!(check(kept, other, head(kept), None), Err(AuditFault::Changed(5)));
    }

    #[test]
    fn rows_that_were_written_of_late_were_not_removed_for_their_age() {
        const DAY: u64 = 24 * 3600;
        let mut rows = log(9);
        let base = head(&rows[..4]);
        let expired = Recorded { at: 9, event: Event::AuditExpired { through: 4 } }.encode();
        append(&mut rows, AuditHead::EMPTY, expired);
        let begin = |row: usize, days: u64| {
            let seen = SeenHead { head: head(&rows[..row]), at: NOW - days * DAY };
            Chain::new(WORKSPACE, base, vec![seen], NOW).map(|_| ())
        };
        // Row 3 ended the log when it was seen, so row 4 is younger than that.
        for (row, days) in [(3, 0), (3, 28), (1, 28), (0, 28)] {
            assert_eq!(begin(row, days), Err(AuditFault::Removed(4)), "{row}, {days} days ago");
        }
        // Old enough, give or take the clocks; or seen with all that was removed.
        for (row, days) in [(3, 29), (3, 400), (4, 0), (7, 0)] {
            assert_eq!(begin(row, days), Ok(()), "{row}, {days} days ago");
        }
        // Nothing follows from what a clock said that was ahead.
        let ahead = SeenHead { head: head(&rows[..3]), at: NOW + DAY };
        assert!(Chain::new(WORKSPACE, base, vec![ahead], NOW).is_ok());
    }

    #[test]
    fn nobody_says_ahead_of_time_that_rows_expire() {
        let mut rows = log(2);
        let through = u64::MAX;
        let early = Recorded { at: 9, event: Event::AuditExpired { through } }.encode();
        append(&mut rows, AuditHead::EMPTY, early);
        for number in 2..6 {
            append(&mut rows, AuditHead::EMPTY, event(number));
        }
        let check = |base: usize| check(&rows[base..], head(&rows[..base]), head(&rows), None);
        assert_eq!(check(2), Ok(head(&rows)));
        assert_eq!(check(3), Err(AuditFault::Removed(3)));
    }

    #[test]
    fn what_was_remembered_without_a_time_is_still_read() {
        let head = AuditHead { seq: 3, hash: AuditHash([4; 32]) };
        let old = serde_json::to_string(&head).unwrap();
        assert_eq!(serde_json::from_str::<SeenHead>(&old).unwrap(), SeenHead { head, at: 0 });
        let seen = SeenHead { head, at: NOW };
        let new = serde_json::to_string(&seen).unwrap();
        assert_eq!(serde_json::from_str::<SeenHead>(&new).unwrap(), seen);
        assert_eq!(serde_json::from_str::<AuditHead>(&new).unwrap(), head);
    }
}

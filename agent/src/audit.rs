//! The audit log as the hub keeps it: followed row by row, and where it was seen to end, remembered.
//!
//! The hub can leave out what happened, or write what did not. It cannot change what was there when an
//! agent last looked: every agent remembers, with each beat, where the log ended.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use connect_spec::{
    audit::{AuditFault, AuditHead, AuditRow, Chain, Recorded, SeenHead},
    control::{Reply, Request},
    ids::{AgentId, ServiceId, ServiceName},
};
use serde::Serialize;

use crate::{
    clock,
    directory::{Directory, unexpected_reply},
    error::{Error, ErrorKind, Result},
    home::Home,
};

/// Heads that are remembered: of the last hours each, of the time before fewer and fewer.
const MAX_SEEN: usize = 64;
/// An end that stays the same is noted again this often.
const RENEW_SEEN: Duration = Duration::from_secs(3600);

/// A row of the audit log, with the names that this agent knows for the ids in it.
#[derive(Debug, Clone, Serialize)]
pub struct RecordedRow {
    /// Its number.
    pub seq: u64,
    /// What happened, and when.
    #[serde(flatten)]
    pub recorded: Recorded,
    /// What people call the agent that acted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agent: Option<String>,
    /// What people call the other agent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer: Option<String>,
    /// What the service is called.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service: Option<ServiceName>,
}

/// An audit log that holds.
#[derive(Debug, Clone, Serialize)]
pub struct AuditVerdict {
    /// How many rows there are.
    pub rows: u64,
    /// The number before the first of them: those up to it were removed for their age.
    pub expired: u64,
    /// The last one.
    pub head: AuditHead,
    /// How many times the log was seen before, by this agent, that this one goes on from.
    pub seen: usize,
}

/// Reads the audit log, or a part of it, page by page.
#[derive(Debug)]
pub struct AuditReader {
    directory: Directory,
    labels: BTreeMap<AgentId, String>,
    services: BTreeMap<ServiceId, ServiceName>,
    chain: Option<Chain>,
    after: u64,
    since: Option<u64>,
    base: AuditHead,
    head: AuditHead,
    seen: Vec<SeenHead>,
    page: VecDeque<AuditRow>,
    more: bool,
}

impl AuditReader {
    /// Begins with the first row there is; every row is held against the one before it. With `since`, in
    /// milliseconds since 1970, with the first that is not older, and nothing is proven of the rows.
    ///
    /// # Errors
    /// What the hub has against it; [`ErrorKind::TrustViolation`] when the log does not go on from where
    /// this agent saw it end before.
    pub async fn new(directory: Directory, since: Option<u64>) -> Result<Self> {
        let agents = directory.agents().await?;
        let services = directory.services().await?;
        let mut reader = Self {
            labels: agents.into_iter().map(|agent| (agent.agent_id, agent.label)).collect(),
            services: services.into_iter().map(|found| (found.service_id, found.name)).collect(),
            chain: None,
            after: 0,
            since,
            base: AuditHead::EMPTY,
            head: AuditHead::EMPTY,
            seen: directory.workspace().home().load_seen_audit()?,
            page: VecDeque::new(),
            more: false,
            directory,
        };
        reader.fetch().await?;
        if since.is_none() {
            let workspace = reader.directory.workspace().identity().workspace_id();
            let chain = Chain::new(workspace, reader.base, reader.seen.clone(), clock::now());
            reader.chain = Some(chain.map_err(fault)?);
        }
        Ok(reader)
    }

    async fn fetch(&mut self) -> Result<()> {
        let request = Request::Audit { after: self.after, since: self.since };
        let Reply::Audit { base, head, rows, more } =
            self.directory.session().request(request).await?
        else {
            return Err(unexpected_reply());
        };
        // A page that promises more and brings nothing would be asked for without end.
        self.more = more && !rows.is_empty();
        self.after = rows.last().map_or(self.after, |row| row.seq.max(self.after));
        (self.base, self.head, self.page) = (base, head, rows.into());
        Ok(())
    }

    /// The next row; `None` at the end, where asking again finds what was added meanwhile.
    ///
    /// # Errors
    /// [`ErrorKind::TrustViolation`] when a row is missing, changed or not where it was: its number is in
    /// the message.
    pub async fn next(&mut self) -> Result<Option<RecordedRow>> {
        if self.page.is_empty() && !self.more {
            self.fetch().await?;
        }
        while self.page.is_empty() && self.more {
            self.fetch().await?;
        }
        let Some(row) = self.page.pop_front() else {
            return self.end().map(|()| None);
        };
        let recorded = match &mut self.chain {
            Some(chain) => chain.next(&row).map_err(fault)?,
            None => {
                serde_json::from_str(&row.event).map_err(|_| fault(AuditFault::Changed(row.seq)))?
            }
        };
        Ok(Some(self.with_names(row.seq, recorded)))
    }

    /// All rows are read: what this agent saw before is in them, and from now on this is what it saw.
    fn end(&self) -> Result<()> {
        let Some(chain) = &self.chain else {
            return Ok(());
        };
        chain.check_end(self.head).map_err(fault)?;
        // A running agent may have heard of a later end meanwhile.
        remember(self.directory.workspace().home(), self.head).map(|_| ())
    }

    /// Reads the log to its end, and says what it comes to.
    ///
    /// # Errors
    /// Those of [`AuditReader::next`].
    pub async fn verify(mut self) -> Result<AuditVerdict> {
        let mut rows = 0;
        while self.next().await?.is_some() {
            rows += 1;
        }
        Ok(AuditVerdict { rows, expired: self.base.seq, head: self.head, seen: self.seen.len() })
    }

    fn with_names(&self, seq: u64, recorded: Recorded) -> RecordedRow {
        let ids = recorded.event.ids();
        let label = |id: Option<AgentId>| id.and_then(|id| self.labels.get(&id).cloned());
        RecordedRow {
            seq,
            agent: label(ids.agent),
            peer: label(ids.peer),
            service: ids.service.and_then(|id| self.services.get(&id).cloned()),
            recorded,
        }
    }
}

fn fault(fault: AuditFault) -> Error {
    Error::new(
        ErrorKind::TrustViolation,
        format_args!("the hub's audit log does not hold: {fault}"),
    )
    .hint("whoever runs the hub or its database changed it: ask them, and compare with a backup")
}

/// Remembers where the hub says that the audit log ends, before anything of it is proven.
pub(crate) fn remember_audit(home: &Home, head: AuditHead) -> Result<()> {
    if let Some(last) = remember(home, head)? {
        tracing::warn!(
            event = "audit",
            seq = head.seq,
            seen = last.seq,
            "the hub's audit log is shorter than it was, or another: `connect audit verify` says where"
        );
    }
    Ok(())
}

/// Remembers where the audit log ends, unless it was seen to end there or later: then that place, if it is
/// another. Nothing that was remembered before is forgotten: by when an older end was seen, rows after it
/// are known to be young.
fn remember(home: &Home, head: AuditHead) -> Result<Option<AuditHead>> {
    let _lock = home.lock_trust()?;
    let mut seen = home.load_seen_audit()?;
    let at = clock::now();
    match seen.last_mut() {
        Some(last) if last.head == head => {
            if last.at.abs_diff(at) < RENEW_SEEN.as_secs() {
                return Ok(None);
            }
            last.at = at;
        }
        Some(last) if head.seq <= last.head.seq => return Ok(Some(last.head)),
        Some(_) | None => {
            seen.push(SeenHead { head, at });
            thin_out(&mut seen);
        }
    }
    home.save_seen_audit(&seen)?;
    Ok(None)
}

/// Drops every second of the older half once there are too many; the first stays.
fn thin_out(seen: &mut Vec<SeenHead>) {
    if seen.len() <= MAX_SEEN {
        return;
    }
    let half = seen.len() / 2;
    let mut index = 0;
    seen.retain(|_| {
        index += 1;
        index > half || index % 2 == 1
    });
}

#[cfg(test)]
mod tests {
    use connect_spec::audit::AuditHash;

    use super::*;

    fn home() -> (tempfile::TempDir, Home) {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::at(dir.path().join("home"));
        home.create().unwrap();
        (dir, home)
    }

    #[test]
    fn what_was_seen_first_and_last_stays_remembered() {
        let (_dir, home) = home();
        let head =
            |seq: u64| AuditHead { seq, hash: AuditHash([u8::try_from(seq % 251).unwrap(); 32]) };
        for seq in 1..=1000 {
            remember_audit(&home, head(seq)).unwrap();
            // What is older, or another, changes nothing.
            remember_audit(&home, head(seq / 2)).unwrap();
            remember_audit(&home, AuditHead { seq, hash: AuditHash([0xee; 32]) }).unwrap();
        }
        let seen = home.load_seen_audit().unwrap();
        assert!(seen.len() <= MAX_SEEN && seen.is_sorted_by_key(|seen| seen.head.seq));
        assert_eq!((seen[0].head, seen[seen.len() - 1].head), (head(1), head(1000)));
        assert!(seen.iter().filter(|seen| seen.head.seq > 960).count() > 20);
    }

    #[test]
    fn an_end_that_stays_is_noted_with_the_time_when_it_was_last_there() {
        let (_dir, home) = home();
        let head = AuditHead { seq: 7, hash: AuditHash([7; 32]) };
        let (now, hour) = (clock::now(), RENEW_SEEN.as_secs());
        for (before, is_renewed) in
            [(now - 60, false), (now - 2 * hour, true), (now + 2 * hour, true)]
        {
            home.save_seen_audit(&[SeenHead { head, at: before }]).unwrap();
            remember_audit(&home, head).unwrap();
            let seen = home.load_seen_audit().unwrap();
            assert_eq!((seen.len(), seen[0].head), (1, head));
            assert_eq!(seen[0].at >= now && seen[0].at < now + hour, is_renewed, "{before}");
        }
    }
}

//! Everything that this program prints: results on stdout, the rest on stderr.

use std::{
    io::{self, Write},
    net::SocketAddr,
    os::fd::AsFd,
    path::Path,
    sync::{Mutex, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use clap::ColorChoice;
use connect_agent::{
    AgentInfo, ApiKeyInfo, AuditVerdict, Checked, EntryInfo, Error, ErrorKind, Finding,
    FindingState, Founded, Home, Identity, InviteInfo, NewApiKey, NewShare, RecordedRow, Recovered,
    Result, Revoked, Rotated, ServiceInfo, ShareInfo, Verification, date,
    local::{AgentStatus, ExposedStatus, ReachedStatus, TrustStatus},
};
use connect_spec::{ids::CredentialId, objects::UnixTime};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::Serialize;
use serde_json::json;

use crate::{agent_log::RotatingFile, daemon::Service, terminal, usage};

// In place of the standard library's, which panic when the reader is gone, as in `connect agents | head`.
macro_rules! println {
    ($($text:tt)*) => { written(writeln!(std::io::stdout(), $($text)*)) };
}
macro_rules! eprintln {
    ($($text:tt)*) => {{ let _ = writeln!(std::io::stderr(), $($text)*); }};
}

/// Why a result could not be written, the first time.
static UNWRITTEN: Mutex<Option<io::Error>> = Mutex::new(None);

/// Remembers that a result was not written: it may be one that is shown once.
fn written(result: io::Result<()>) {
    if let Err(error) = result {
        UNWRITTEN.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
    }
}

/// Whether all results went where they were to go.
///
/// # Errors
/// They did not, and it was not for want of a reader: one that went away has what it wanted.
pub(crate) fn finish() -> Result<()> {
    flush();
    let unwritten = UNWRITTEN.lock().unwrap_or_else(PoisonError::into_inner).take();
    match unwritten {
        Some(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Error::new(ErrorKind::Other, format_args!("the output cannot be written: {error}"))
                .hint("what the command does is done; what it printed is lost"))
        }
        Some(_) | None => Ok(()),
    }
}

/// Whether there is still somebody who reads the results; without one, following something is no use.
pub(crate) fn is_read() -> bool {
    if UNWRITTEN.lock().unwrap_or_else(PoisonError::into_inner).is_some() {
        return false;
    }
    let stdout = io::stdout();
    let mut asked = [PollFd::new(stdout.as_fd(), PollFlags::empty())];
    // A pipe without a reader says so by itself.
    !poll(&mut asked, PollTimeout::ZERO).is_ok_and(|_| {
        asked[0].revents().is_some_and(|events| events.intersects(PollFlags::POLLERR))
    })
}

/// A share by which this home is a guest, for people.
#[derive(Debug, Serialize)]
pub(crate) struct JoinedShare {
    id: CredentialId,
    label: String,
    expires: UnixTime,
    over: bool,
    hub: String,
}

impl JoinedShare {
    /// That of a guest; none for a member.
    pub(crate) fn of(identity: &connect_agent::Identity) -> Option<Self> {
        let (id, expires) = (identity.share_id()?, identity.share_end());
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let label = identity.share_name();
        Some(Self { id, label, expires, over: now > expires, hub: identity.hub().to_owned() })
    }
}

/// How to print.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Output {
    pub(crate) json: bool,
    pub(crate) quiet: bool,
    color: ColorChoice,
}

/// What `connect` alone finds.
#[derive(Debug)]
pub(crate) enum Situation {
    NotEnrolled,
    Stopped(Box<Identity>),
    Running(Box<AgentStatus>),
}

impl Output {
    pub(crate) fn new(json: bool, quiet: bool, color: ColorChoice) -> Self {
        Self { json, quiet, color }
    }

    /// Waits for something; on a terminal, if it takes long, it is shown what.
    pub(crate) async fn wait<T>(self, what: &str, awaited: impl Future<Output = T>) -> T {
        terminal::wait(what, !self.quiet && !self.json, awaited).await
    }

    /// Prints what completes command lines in a shell.
    pub(crate) fn completions(self, shell: clap_complete::Shell, command: &mut clap::Command) {
        let mut script = Vec::new();
        clap_complete::generate(shell, command, "connect", &mut script);
        written(io::stdout().write_all(&script));
    }

    /// A word to people.
    pub(crate) fn note(self, text: impl std::fmt::Display) {
        if !self.quiet && !self.json {
            eprintln!("{text}");
        }
    }

    /// The error that ends the program.
    pub(crate) fn error(self, error: &Error) {
        let hint = error.hint.as_deref().unwrap_or_else(|| what_to_do(error.kind));
        if self.json {
            let error = error.clone().hint(hint);
            eprintln!("{}", serde_json::to_string(&error).expect("errors become JSON"));
        } else {
            let coloured = terminal::is_coloured(self.color, &io::stderr());
            eprintln!("{} {error}", terminal::paint("error:", terminal::FAILURE, coloured));
            eprintln!("{} {hint}", terminal::paint("hint:", terminal::ADVICE, coloured));
        }
    }

    /// Prints a table.
    fn table<const N: usize>(self, header: [&str; N], rows: impl Iterator<Item = [String; N]>) {
        let coloured = terminal::is_coloured(self.color, &io::stdout());
        let rows: Vec<_> = rows.collect();
        for line in terminal::lines(header, &rows, terminal::width(), coloured, style) {
            println!("{line}");
        }
    }

    pub(crate) fn founded(self, founded: &Founded) {
        if self.json {
            print_json(&json!({
                "workspace_id": founded.workspace_id,
                "agent_id": founded.agent_id,
                "recovery_words": *founded.recovery_words,
                "invite": *founded.invite,
            }));
            return;
        }
        self.note("Workspace created. These 24 words restore it when every signer is lost.");
        self.note("Write them down; they are shown once and stored nowhere:\n");
        print_words(&founded.recovery_words);
        self.note("\nOn the next machine (1 use, within 1 hour):\n");
        println!("  connect join {}", *founded.invite);
        self.note("\nHere: connect up --detach, then connect expose HOST:PORT --name NAME");
    }

    pub(crate) fn invite(self, code: &str) {
        if self.json {
            print_json(&json!({ "invite": code }));
        } else {
            println!("{code}");
        }
    }

    pub(crate) fn joined(self, identity: &connect_agent::Identity) {
        let share = JoinedShare::of(identity);
        if self.json {
            print_json(&json!({
                "workspace_id": identity.workspace_id(),
                "agent_id": identity.agent_id(),
                "share": share,
            }));
            return;
        }
        if let Some(share) = share {
            self.note(format_args!(
                "Joined as a guest by the share `{}`, which counts until {}.",
                share.label,
                date(share.expires)
            ));
            self.note("Next: connect services, then connect reach NAME");
            return;
        }
        self.note(format_args!("Joined as agent {}.", identity.agent_id().short()));
        self.note("Next: connect services, then connect reach NAME");
    }

    pub(crate) fn exposed(self, exposed: &ExposedStatus) {
        if self.json {
            print_json(exposed);
            return;
        }
        println!("{}", exposed.name);
        let health = if exposed.target_ok { "" } else { " (nothing answers there yet)" };
        self.note(format_args!("{} is exposed from {}{health}", exposed.name, exposed.target));
    }

    pub(crate) fn reached(self, reached: &ReachedStatus) {
        if self.json {
            print_json(reached);
            return;
        }
        println!("{}", reached.address);
        if let Some(reason) = &reached.passed_over {
            self.note(format_args!("{} is not on {reason}.", reached.name));
        }
        match reached.rtt_ms {
            Some(rtt) => self.note(format_args!("{} is reached, {rtt:.1} ms away", reached.name)),
            None => self.note(format_args!("{} is not reached yet", reached.name)),
        }
        let usage = reached.address.parse::<SocketAddr>().ok().zip(reached.protocol.as_deref());
        if let Some(usage) = usage.and_then(|(at, protocol)| usage::of(protocol, &reached.name, at))
        {
            self.note(format_args!("To use it: {usage}"));
        }
    }

    pub(crate) fn shared(self, share: &NewShare) {
        if self.json {
            print_json(&json!({ "code": *share.code, "share": share.info }));
            return;
        }
        println!("{}", *share.code);
        let info = &share.info;
        self.note(format_args!(
            "By this code {} may join and reach {} until {}; the code is a secret.",
            if info.uses == 1 { "one guest".to_owned() } else { format!("{} guests", info.uses) },
            info.services.join(", "),
            date(info.expires)
        ));
        self.note(format_args!(
            "There: connect join CODE. To end it here: connect unshare {}",
            as_word(&info.label)
        ));
    }

    pub(crate) fn shares(self, given: &[ShareInfo], joined: &[JoinedShare]) {
        if self.json {
            print_json(&json!({ "given": given, "joined": joined }));
            return;
        }
        if given.is_empty() && joined.is_empty() {
            self.note("There is no share. connect share NAME makes one.");
        }
        self.table(
            ["SHARED", "SERVICES", "UNTIL", "JOINED", "GUESTS", "ID"],
            given.iter().map(|share| {
                let guests: Vec<_> =
                    share.guests.iter().map(|guest| guest.label.as_str()).collect();
                [
                    share.label.clone(),
                    share.services.join(","),
                    until(share.expires, share.over),
                    format!("{} of {}", share.used, share.uses),
                    guests.join(","),
                    share.id.to_string(),
                ]
            }),
        );
        self.table(
            ["GUEST BY", "HUB", "UNTIL", "ID"],
            joined.iter().map(|share| {
                let until = until(share.expires, share.over);
                [share.label.clone(), share.hub.clone(), until, share.id.to_string()]
            }),
        );
    }

    pub(crate) fn checked(self, checked: &Checked) {
        if self.json {
            print_json(checked);
        } else {
            self.findings(&checked.findings);
        }
    }

    pub(crate) fn examined(self, findings: &[Finding]) {
        if self.json {
            let ok = findings.iter().all(|finding| finding.state != FindingState::Fail);
            print_json(&json!({ "ok": ok, "findings": findings }));
        } else {
            self.findings(findings);
        }
    }

    /// One line for each finding, and below it what to do.
    fn findings(self, findings: &[Finding]) {
        let unicode = speaks_unicode();
        let width = findings.iter().map(|finding| finding.title.chars().count()).max();
        let width = width.unwrap_or_default().max(12);
        let coloured = terminal::is_coloured(self.color, &io::stdout());
        for Finding { state, title, text, hint, .. } in findings {
            let (mark, style) = match (state, unicode) {
                (FindingState::Ok, true) => ("✓", terminal::GOOD),
                (FindingState::Warn, true) => ("⚠", terminal::DOUBTFUL),
                (FindingState::Fail, true) => ("✗", terminal::BAD),
                (FindingState::Ok, false) => ("ok  ", terminal::GOOD),
                (FindingState::Warn, false) => ("warn", terminal::DOUBTFUL),
                (FindingState::Fail, false) => ("FAIL", terminal::BAD),
            };
            let text = if unicode {
                text.clone()
            } else {
                text.replace('↑', "up").replace('↓', "down")
            };
            let column = mark.chars().count() + 1 + width + 1;
            let mut lines = terminal::beside(column, &text, terminal::width()).into_iter();
            let mark = terminal::paint(mark, style, coloured);
            println!("{mark} {title:width$} {}", lines.next().unwrap_or_default());
            let hint =
                hint.iter().flat_map(|hint| terminal::beside(column, hint, terminal::width()));
            for line in lines.chain(hint) {
                println!("{:column$}{line}", "");
            }
        }
    }

    pub(crate) fn services(self, services: &[ServiceInfo]) {
        if self.json {
            print_json(services);
            return;
        }
        if services.is_empty() {
            self.note("No service is exposed. connect expose HOST:PORT --name NAME offers one.");
        }
        let row = |service: &ServiceInfo| {
            let state = match (service.online, service.target_ok) {
                (false, _) => "offline",
                (true, Some(false)) => "online, target down",
                (true, Some(true) | None) => "online",
            };
            let (name, protocol) = (service.name.to_string(), service.protocol.clone());
            [name, protocol, service.label.clone(), state.to_owned()]
        };
        if services.iter().all(|service| service.share.is_none()) {
            self.table(["NAME", "PROTOCOL", "AGENT", "STATE"], services.iter().map(row));
            return;
        }
        self.table(
            ["NAME", "PROTOCOL", "AGENT", "STATE", "SHARE"],
            services.iter().map(|service| {
                let [name, protocol, agent, state] = row(service);
                [name, protocol, agent, state, service.share.clone().unwrap_or_default()]
            }),
        );
    }

    pub(crate) fn agents(self, agents: &[AgentInfo]) {
        if self.json {
            print_json(agents);
            return;
        }
        self.table(
            ["LABEL", "ID", "ROLE", "STATE", "TAGS"],
            agents.iter().map(|agent| {
                let state = match (agent.revoked, agent.online) {
                    (true, _) => "revoked",
                    (false, true) => "online",
                    (false, false) => "offline",
                };
                let tags = agent.tags.join(",");
                [
                    agent.label.clone(),
                    agent.agent_id.to_string(),
                    agent.role.into(),
                    state.into(),
                    tags,
                ]
            }),
        );
    }

    pub(crate) fn status(self, status: &AgentStatus) {
        if self.json {
            print_json(status);
            return;
        }
        let connected = match (&status.error, status.connected) {
            (_, true) => "connected".to_owned(),
            (None, false) => "not connected".to_owned(),
            (Some(cause), false) => format!("not connected: {cause}"),
        };
        println!("agent      {} ({})", status.label, status.agent_id.short());
        if let Some(share) = &status.share {
            let label =
                share.label.as_ref().map_or_else(|| share.id.to_string(), ToString::to_string);
            println!("guest by   {label} (until {})", date(share.expires));
        }
        println!("workspace  {}", status.workspace_id);
        println!("hub        {} ({connected})", without_pin(&status.hub));
        println!("trust      {}", trust_line(&status.trust));
        let exposed = status.exposed.iter().map(|exposed| {
            let health = if exposed.target_ok { "target ok" } else { "target down" };
            let health = format!("{health}, {} streams", exposed.streams);
            ["exposed  ".to_owned(), exposed.name.to_string(), exposed.target.clone(), health]
        });
        let reached = status.reached.iter().map(|reached| {
            let health = match (&reached.error, reached.rtt_ms) {
                (_, Some(rtt)) => format!("active, {rtt:.1} ms, {} streams", reached.streams),
                // Without a hub all are not active, for the one reason that is said already.
                (Some(error), None) if status.error.is_none() => format!("not active: {error}"),
                (Some(_), None) => "not active".to_owned(),
                (None, None) => "connecting".to_owned(),
            };
            ["reached  ".to_owned(), reached.name.to_string(), reached.address.clone(), health]
        });
        self.table(["", "NAME", "ADDRESS", "STATE"], exposed.chain(reached));
        for guest in &status.shares {
            println!();
            self.status(guest);
        }
    }

    /// What this machine is, and what one can do next.
    pub(crate) fn welcome(self, home: &Path, situation: &Situation) {
        if self.json {
            let status =
                if let Situation::Running(status) = situation { Some(status) } else { None };
            print_json(&json!({
                "home": home.to_string_lossy(),
                "enrolled": !matches!(situation, Situation::NotEnrolled),
                "running": status.is_some(),
                "status": status,
            }));
            return;
        }
        match situation {
            Situation::NotEnrolled => {
                println!("This machine is in no workspace yet.");
                println!(
                    "  connect init --hub URL    begin one; `connect-hub serve` prints the URL"
                );
                println!(
                    "  connect join CODE         join one; `connect invite` there prints the code"
                );
                println!("`connect --help` shows all commands.");
            }
            Situation::Stopped(identity) => {
                println!("This is agent {} ({}).", identity.label(), identity.agent_id().short());
                println!("It is not running.");
                println!("  connect up --detach       start it, and what it exposed and reached");
            }
            Situation::Running(status) => {
                self.status(status);
                if !status.connected {
                    println!("\nIt goes on trying to connect.");
                    if let Some(cause) = &status.error {
                        println!("{}", cause.hint.as_deref().unwrap_or(what_to_do(cause.kind)));
                    }
                } else if status.share.is_some() {
                    println!("\n  connect services          see what is shared");
                } else if status.exposed.is_empty() && status.reached.is_empty() {
                    println!("\n  connect HOST:PORT         offer a service");
                    println!("  connect services          see what can be reached");
                } else {
                    println!("\n  connect services          see what else can be reached");
                }
            }
        }
    }

    pub(crate) fn verify(self, workspace_words: &str, agent: Option<&Verification>) {
        if self.json {
            print_json(&json!({
                "workspace_words": workspace_words,
                "agent_id": agent.map(|agent| agent.agent_id),
                "digits": agent.map(|agent| agent.number.digits()),
            }));
            return;
        }
        match agent {
            None => {
                println!("{workspace_words}");
                self.note("Every agent of this workspace shows these words.");
            }
            Some(agent) => {
                println!("{}", agent.number);
                self.note(format_args!(
                    "The same digits at agent {} mean that nobody is in between. Compare them by voice or in person.",
                    agent.agent_id
                ));
            }
        }
    }

    pub(crate) fn rotated(self, rotated: &Rotated) {
        if self.json {
            print_json(rotated);
            return;
        }
        println!("{}", rotated.counter);
        self.note("This agent has a new static key. Others accept the old one for one more day.");
        if !rotated.announced {
            self.note("The hub does not know it yet; the agent tells it when it connects next.");
        }
    }

    pub(crate) fn invites(self, invites: &[InviteInfo]) {
        if self.json {
            print_json(invites);
            return;
        }
        if invites.is_empty() {
            self.note("No invite is open.");
        }
        self.table(
            ["ID", "USED", "UNTIL", "STATE"],
            invites.iter().map(|invite| {
                let state = if invite.over { "over" } else { "open" };
                [
                    invite.id.to_string(),
                    format!("{} of {} used", invite.used, invite.uses),
                    format!("until {}", date(invite.join_until)),
                    state.to_owned(),
                ]
            }),
        );
    }

    pub(crate) fn log(self, entries: &[EntryInfo]) {
        if self.json {
            print_json(entries);
            return;
        }
        if entries.is_empty() {
            self.note("Nothing was signed since the workspace began.");
        }
        self.table(
            ["ENTRY", "TIME", "SIGNED BY", "CHANGES"],
            entries.iter().map(|entry| {
                [
                    entry.seq.to_string(),
                    date(entry.time),
                    entry.signed_by.join(", "),
                    entry.changes.join("; "),
                ]
            }),
        );
    }

    pub(crate) fn signed(self, seq: u64, what: impl std::fmt::Display) {
        if self.json {
            print_json(&json!({ "seq": seq }));
        } else {
            self.note(format_args!("{what} (entry {seq})"));
        }
    }

    pub(crate) fn revoked(self, revoked: &Revoked) {
        if self.json {
            print_json(revoked);
            return;
        }
        self.note(format_args!(
            "{} ({}) is revoked by entry {}. Names made from now on are sealed under a new key.",
            revoked.label,
            revoked.agent_id.short(),
            revoked.seq
        ));
    }

    pub(crate) fn recovered(self, recovered: &Recovered) {
        if self.json {
            print_json(&json!({
                "recovery_words": *recovered.recovery_words,
                "kept": recovered.kept,
            }));
            return;
        }
        self.note(format_args!(
            "Recovered: this agent is the only signer now; {} agents stay members.",
            recovered.kept
        ));
        self.note(
            "These words take the place of the old ones; they are shown once and stored nowhere:\n",
        );
        print_words(&recovered.recovery_words);
    }

    pub(crate) fn audit_row(self, row: &RecordedRow) {
        if self.json {
            print_json(row);
            return;
        }
        let serde_json::Value::Object(mut fields) =
            serde_json::to_value(&row.recorded).expect("plain data becomes JSON")
        else {
            return;
        };
        let mut take = |name: &str| fields.remove(name).map(|value| shown(&value));
        let (_, kind) = (take("at"), take("kind").unwrap_or_default());
        let mut line = format!("{:>6}  {}  {kind:<18}", row.seq, date(row.recorded.at / 1000));
        for (name, known, id) in [
            ("agent", row.agent.clone(), take("agent_id")),
            ("peer", row.peer.clone(), take("peer_id")),
            ("service", row.service.as_ref().map(ToString::to_string), take("service_id")),
        ] {
            if let Some(id) = id {
                let short = || id.get(..8).unwrap_or(&id).to_owned();
                line.push_str(&format!(" {name}={}", known.unwrap_or_else(short)));
            }
        }
        for (name, value) in &fields {
            line.push_str(&format!(" {name}={}", shown(value)));
        }
        println!("{line}");
    }

    pub(crate) fn audit_verdict(self, verdict: &AuditVerdict) {
        if self.json {
            print_json(verdict);
            return;
        }
        let head = verdict.head.hash.to_string();
        println!(
            "{} rows hold, up to row {} ({})",
            verdict.rows,
            verdict.head.seq,
            head.get(..16).unwrap_or(&head)
        );
        if verdict.expired > 0 {
            self.note(format_args!(
                "Rows up to {} were removed for their age, which a later row says.",
                verdict.expired
            ));
        }
        match verdict.seen {
            0 => self.note(
                "This agent never saw the log before, so what was changed until now it cannot know.",
            ),
            seen => self.note(format_args!("It goes on from where this agent saw it end, {seen} times.")),
        }
    }

    pub(crate) fn api_key_created(self, created: &NewApiKey) {
        if self.json {
            print_json(created);
            return;
        }
        println!("{}", created.key.reveal());
        self.note(format_args!(
            "Key {} is valid until {}. It is shown this once.",
            created.key_id,
            date(created.expires_at)
        ));
    }

    pub(crate) fn api_keys(self, keys: &[ApiKeyInfo]) {
        if self.json {
            print_json(keys);
            return;
        }
        if keys.is_empty() {
            self.note("There is no API key.");
        }
        self.table(
            ["ID", "AGENT", "SCOPES", "UNTIL", "USED"],
            keys.iter().map(|info| {
                let key = &info.key;
                let scopes: Vec<String> = key
                    .scopes
                    .iter()
                    .map(|scope| shown(&serde_json::to_value(scope).unwrap_or_default()))
                    .collect();
                [
                    key.key_id.to_string(),
                    info.label.clone().unwrap_or_else(|| key.agent_id.short()),
                    scopes.join(","),
                    format!("until {}", date(key.expires_at)),
                    key.last_used_at
                        .map_or("never used".to_owned(), |at| format!("used {}", date(at))),
                ]
            }),
        );
    }

    /// A service of the system: its definition on stdout.
    pub(crate) fn daemon_installed(self, service: &Service, said: &str) {
        if self.json {
            print_json(service);
        } else {
            println!("{}", service.file.display());
            self.note(said);
        }
    }

    /// Lines of a log as they are; with `--json` each in an object.
    pub(crate) fn log_lines(self, text: &[u8]) {
        if self.json {
            for line in String::from_utf8_lossy(text).lines() {
                println!("{}", json!({ "line": line }));
            }
        } else {
            written(io::stdout().write_all(text));
        }
        flush();
    }

    pub(crate) fn stopped(self) {
        self.note("The agent is stopped.");
    }
}

/// What to do about an error that does not say it itself.
fn what_to_do(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::Other => {
            "`CONNECT_LOG=debug` in the environment shows more; so does `connect logs`"
        }
        ErrorKind::Usage => "`--help` shows how the command is used",
        ErrorKind::NotEnrolled => "`connect init` begins a workspace, `connect join` joins one",
        ErrorKind::HubUnreachable => {
            "is the hub up, and can this machine reach it? `connect status` shows which one it is"
        }
        ErrorKind::ServiceNotFound => "`connect services` lists what there is",
        ErrorKind::Refused => {
            "`connect agents` shows what this agent may do; ask who runs the other side"
        }
        ErrorKind::TrustViolation => {
            "`connect trust log` and `connect verify` show what others should see, too; do not go on before \
             it is clear"
        }
        ErrorKind::TargetUnreachable => "is the service up on the machine that exposes it?",
        ErrorKind::NoAgent => "start it: `connect up --detach`",
        ErrorKind::ExposerOffline => "start the agent on the machine that exposes the service",
    }
}

/// How a cell looks that says how something is.
fn style(cell: &str) -> anstyle::Style {
    match cell {
        "online" | "open" | "connected" => terminal::GOOD,
        "offline" | "over" | "online, target down" | "not connected" => terminal::DOUBTFUL,
        "revoked" => terminal::BAD,
        _ => anstyle::Style::new(),
    }
}

/// A field of an event: text without quotes.
fn shown(value: &serde_json::Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// Whether the terminal's language can write more than ASCII, as the C library chooses it.
fn speaks_unicode() -> bool {
    let set = |name| std::env::var(name).ok().filter(|value: &String| !value.is_empty());
    let locale = set("LC_ALL").or_else(|| set("LC_CTYPE")).or_else(|| set("LANG"));
    let locale = locale.unwrap_or_default().to_ascii_lowercase();
    locale.contains("utf-8") || locale.contains("utf8")
}

/// A label as a shell takes it.
fn as_word(label: &str) -> String {
    if label.chars().all(|character| character.is_ascii_alphanumeric() || "-_.".contains(character))
    {
        label.to_owned()
    } else {
        format!("'{}'", label.replace('\'', "'\\''"))
    }
}

/// A hub's address for people, who have no use for the hash of its certificate.
fn without_pin(hub: &str) -> &str {
    hub.split_once('#').map_or(hub, |(address, _)| address)
}

/// When a share ends, and whether it has.
fn until(expires: UnixTime, over: bool) -> String {
    let date = date(expires);
    if over { format!("{date}, over") } else { date }
}

/// Recovery words, six a line.
fn print_words(words: &str) {
    let words: Vec<_> = words.split(' ').collect();
    for line in words.chunks(6) {
        println!("  {}", line.join(" "));
    }
}

fn trust_line(trust: &TrustStatus) -> String {
    let head = trust.head.get(..8).unwrap_or(&trust.head);
    let mut line = format!("entry {} ({head}), epoch {}", trust.seq, trust.epoch);
    line.push_str(&match trust.beat_age_s {
        Some(age) => format!(", confirmed {age} s ago"),
        None => ", not confirmed by a witness yet".to_owned(),
    });
    for (is_so, word) in [
        (trust.strict, ", policy strict"),
        (trust.forked, ", FORKED: see `connect trust log`, `connect trust settle`"),
        (trust.frozen, ", FROZEN: this version cannot read it, update `connect`"),
    ] {
        if is_so {
            line.push_str(word);
        }
    }
    line
}

/// Asks something on the terminal.
pub(crate) fn prompt(question: &str) {
    let mut stderr = std::io::stderr();
    let _ = write!(stderr, "{question}").and_then(|()| stderr.flush());
}

fn print_json<T: Serialize + ?Sized>(value: &T) {
    println!("{}", serde_json::to_string(value).expect("plain data becomes JSON"));
}

/// Writes the log to stderr, with colours on a terminal that wants them.
pub(crate) fn log_to_stderr(default: &str) {
    let filter = tracing_subscriber::EnvFilter::try_from_env("CONNECT_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(default));
    let choice = terminal::choice_in(&std::env::args_os().collect::<Vec<_>>());
    let colours = terminal::is_coloured(choice, &io::stderr());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(colours)
        .with_target(false)
        .with_writer(std::io::stderr)
        .init();
}

/// Writes the log to `agent.log` in the home, and panics, which nobody would see otherwise.
///
/// # Errors
/// The home cannot be written.
pub(crate) fn log_to_home(home: &Home, default: &str) -> io::Result<()> {
    let filter = tracing_subscriber::EnvFilter::try_from_env("CONNECT_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(default));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false)
        .with_target(false)
        // A full disk costs events and nothing else.
        .log_internal_errors(false)
        .with_writer(Mutex::new(RotatingFile::open(home)?))
        .init();
    std::panic::set_hook(Box::new(|panic| tracing::error!(%panic, "a task panicked")));
    Ok(())
}

/// Pushes out what was printed, before a process goes on for long.
pub(crate) fn flush() {
    written(std::io::stdout().flush());
}

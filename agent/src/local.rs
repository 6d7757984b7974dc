//! How commands talk to the running agent: one JSON line each way, on a Unix socket of the home.
//!
//! The socket is in a directory that only this user can enter; whoever can connect may command.

use std::{fs, io, path::Path, time::Duration};

use connect_spec::{
    ids::{AgentId, CredentialId, Label, ServiceId, ServiceName, WorkspaceId},
    objects::UnixTime,
};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
    time::timeout,
};

use crate::{
    agent::Rotated,
    check::Checked,
    doctor::SelfTest,
    error::{Error, ErrorKind, Result},
    home::Home,
    host::Reaching,
};

/// Longest command or answer.
const MAX_LINE: u64 = 1024 * 1024;
/// A command that waits for a tunnel is answered within this time, or there is no agent.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(90);

/// What the running agent can be told.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub enum Command {
    /// How are you?
    Status,
    /// Offer a service, now and after each start.
    Expose {
        /// Under this name; `None`: under one that says what it is.
        name: Option<ServiceName>,
        /// From here.
        target: String,
        /// To these tags and agents; to all members when empty.
        allow: Vec<String>,
        /// Even if another agent, which is offline, has the name.
        take_over: bool,
    },
    /// Offer it no longer.
    Unexpose {
        /// The service.
        name: ServiceName,
    },
    /// Reach a service, now and after each start.
    Reach(Reaching),
    /// Reach it no longer.
    Unreach {
        /// The service.
        name: ServiceName,
    },
    /// Look for shares that were joined meanwhile.
    LookAtShares,
    /// End what is reached by a share, and forget it.
    Leave {
        /// Its label or id.
        share: String,
    },
    /// Look at a service through its exposer.
    Check {
        /// The service.
        name: ServiceName,
        /// By this share, if given.
        #[serde(default)]
        share: Option<String>,
        /// Whether to measure how fast bytes travel.
        speed: bool,
    },
    /// Reach yourself through the hub.
    SelfTest,
    /// Make a new static key.
    Rotate,
    /// Read the trust log again: another process of the home added to it.
    LookAtLog,
    /// Stop.
    Down,
}

/// What the agent answers.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
pub enum Answer {
    /// To [`Command::Status`].
    Status(AgentStatus),
    /// To [`Command::Expose`].
    Exposed(ExposedStatus),
    /// To [`Command::Reach`].
    Reached(ReachedStatus),
    /// To [`Command::Check`].
    Checked(Checked),
    /// To [`Command::SelfTest`].
    SelfTested(SelfTest),
    /// To [`Command::Rotate`].
    Rotated(Rotated),
    /// To the rest.
    Done,
    /// Not done.
    Failed(Error),
}

/// How an agent is doing.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AgentStatus {
    /// The version of the program that runs.
    #[serde(default)]
    pub version: String,
    /// The agent.
    pub agent_id: AgentId,
    /// What people call it.
    pub label: Label,
    /// Its workspace.
    pub workspace_id: WorkspaceId,
    /// Its hub.
    pub hub: String,
    /// Whether it is logged in there.
    pub connected: bool,
    /// Why not, if a try has failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<Error>,
    /// Its view of the trust log.
    pub trust: TrustStatus,
    /// What it offers.
    pub exposed: Vec<ExposedStatus>,
    /// What it reaches.
    pub reached: Vec<ReachedStatus>,
    /// The share by which it is a guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub share: Option<ShareStatus>,
    /// The agents by which the owner of this home is a guest elsewhere.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shares: Vec<AgentStatus>,
}

/// The share of a guest.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ShareStatus {
    /// Its id.
    pub id: CredentialId,
    /// What its giver calls it.
    pub label: Option<Label>,
    /// Until when it counts, in seconds since 1970.
    pub expires: UnixTime,
}

/// An agent's view of the trust log.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TrustStatus {
    /// Entries after the genesis.
    pub seq: u64,
    /// Hash of the last one.
    pub head: String,
    /// Seconds since a witness last confirmed the head, if one did since the agent started.
    pub beat_age_s: Option<u64>,
    /// Whether the log holds something that this version cannot read: no new tunnels then.
    pub frozen: bool,
    /// Whether the log forked and nobody settled it yet.
    #[serde(default)]
    pub forked: bool,
    /// Whether the policy of the workspace is strict.
    #[serde(default)]
    pub strict: bool,
    /// The epoch under whose key names are sealed.
    #[serde(default)]
    pub epoch: u32,
}

/// An exposed service.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ExposedStatus {
    /// Its name.
    pub name: ServiceName,
    /// Where its connections go.
    pub target: String,
    /// Its id.
    pub service_id: ServiceId,
    /// Open streams.
    pub streams: usize,
    /// Whether the target answered when it was last tried.
    pub target_ok: bool,
}

/// A reached service.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ReachedStatus {
    /// Its name.
    pub name: ServiceName,
    /// Where it is on this machine.
    pub address: String,
    /// What is spoken there, as its exposer says; told to the command that reaches it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<String>,
    /// Whether the exposer answered an encrypted ping over the tunnel that is up.
    pub active: bool,
    /// The last round trip in milliseconds.
    pub rtt_ms: Option<f64>,
    /// Open streams.
    pub streams: usize,
    /// Why it is not on the port that one would expect: `port 5432, which is held by …`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub passed_over: Option<String>,
    /// How often the keys were replaced under the conversation that goes on.
    #[serde(default)]
    pub rekeys: u64,
    /// Why it is not active.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<Error>,
}

/// Asks the agent of a home; `None` when none is running.
///
/// # Errors
/// What the agent answered.
pub async fn ask(home: &Home, command: &Command) -> Result<Option<Answer>> {
    let Ok(socket) = UnixStream::connect(home.socket_path()?).await else {
        return Ok(None);
    };
    let exchange = async {
        let mut socket = BufReader::new(socket);
        let mut line = serde_json::to_string(command).expect("commands become JSON");
        line.push('\n');
        socket.write_all(line.as_bytes()).await?;
        line.clear();
        socket.take(MAX_LINE).read_line(&mut line).await?;
        io::Result::Ok(line)
    };
    let failed = |cause: &dyn std::fmt::Display| {
        Error::new(ErrorKind::NoAgent, format_args!("the running agent does not answer: {cause}"))
            .hint("stop it (`connect down`) and start it again (`connect up`)")
    };
    let line = timeout(ANSWER_TIMEOUT, exchange)
        .await
        .map_err(|error| failed(&error))?
        .map_err(|error| failed(&error))?;
    match serde_json::from_str(&line) {
        Ok(Answer::Failed(error)) => Err(error),
        Ok(answer) => Ok(Some(answer)),
        Err(_) => Err(failed(&"its answer is not understood")),
    }
}

/// Opens the socket of a home whose lock is held, in place of one that a crash left.
pub(crate) fn listen(path: &Path) -> Result<UnixListener> {
    let failed = |error: &io::Error| {
        Error::new(ErrorKind::Other, format_args!("cannot listen on `{}`: {error}", path.display()))
            .hint(
                "an agent writes to its home: make it writable, or set CONNECT_HOME to another one",
            )
    };
    if let Err(error) = fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        return Err(failed(&error));
    }
    UnixListener::bind(path).map_err(|error| failed(&error))
}

/// Reads one command; `None` when the other side says nothing that is one.
pub(crate) async fn read(socket: &mut BufReader<UnixStream>) -> Option<Command> {
    let mut line = String::new();
    socket.take(MAX_LINE).read_line(&mut line).await.ok()?;
    serde_json::from_str(&line).ok()
}

/// Writes the answer. A command that went away does not want it.
pub(crate) async fn answer(socket: &mut BufReader<UnixStream>, answer: &Answer) {
    let mut line = serde_json::to_string(answer).expect("answers become JSON");
    line.push('\n');
    if let Err(error) = socket.write_all(line.as_bytes()).await {
        tracing::debug!(%error, "a command went away before its answer");
    }
}

//! A control session with the hub: challenge, proof, then requests and what the hub brings.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use connect_crypto::invite::InviteKeys;
use connect_spec::{
    bytes::Blob,
    control::{
        self, CreateWorkspace, ErrorCode, ErrorReport, FromAgent, FromHub, LOGIN_KIND, Login,
        Nonce, REDEEM_KIND, Redeem, Reply, Request, SessionKind, Ticket, TunnelRequest,
    },
    encoding::Encoding,
    ids::{AgentId, CredentialId, WorkspaceId},
    limits::{CONTROL_DEAD_AFTER, LOGIN_TIMEOUT, MAX_CONTROL_BYTES},
    log::Head,
};
use futures_util::{SinkExt, StreamExt};
use tokio::{
    sync::{mpsc, oneshot},
    task::AbortHandle,
    time::{Instant, sleep_until, timeout},
};
use tokio_tungstenite::tungstenite::{Bytes, Message, protocol::WebSocketConfig};

use super::dial::{HubSocket, HubUrl};
use crate::{
    error::{Error, ErrorKind, Result},
    identity::Identity,
    random,
    workspace::Workspace,
};

/// A request that the hub does not answer within this time has failed. It is longer than the time
/// that the hub gives an exposer to answer.
const REPLY_TIMEOUT: Duration = Duration::from_secs(15);
/// A hub that says nothing for so long after a request is asked for a sign of life. Its database may be
/// slow, but it answers a ping at once.
const PROBE_AFTER: Duration = Duration::from_secs(5);
/// A hub that asks its agents to stay away for longer is not heeded.
const MAX_RESTART_PAUSE: Duration = Duration::from_secs(30);
/// Messages waiting for a slow control socket.
const QUEUE: usize = 256;

/// A control socket whose challenge was read, but nothing proven yet.
pub(crate) struct Greeted {
    socket: HubSocket,
    authority: String,
    nonce: Nonce,
    moved: bool,
}

/// What the holder of an invite gets. Nothing in it is verified yet.
pub(crate) struct Invitation {
    pub(crate) genesis: Blob,
    pub(crate) credential: Blob,
    pub(crate) wrap: Option<control::EpochWrap>,
}

/// A logged-in session; closed when dropped.
#[derive(Debug)]
pub(crate) struct Session {
    outgoing: mpsc::Sender<Outgoing>,
    next_id: AtomicU64,
    encodings: Vec<Encoding>,
    displaced: bool,
    task: AbortHandle,
}

/// What the hub brings without being asked.
#[derive(Debug)]
pub(crate) enum Incoming {
    /// The hub's trust log grew.
    LogGrew(Head),
    /// The secrets of an epoch are there for this agent.
    WrapStored,
    /// A share was made that names a service of this agent.
    ShareMade,
    /// A reacher asks for a tunnel.
    Tunnel { initiator: AgentId, request: TunnelRequest, ticket: Ticket },
    /// The session is over; the last thing that arrives.
    Closed(Ended),
}

/// Why a session is over.
#[derive(Debug)]
pub(crate) enum Ended {
    /// Another session of this agent took over.
    Displaced,
    /// The hub restarts and asks to wait this long.
    Restarting(Duration),
    /// The socket failed or was closed.
    Lost(String),
}

#[derive(Debug)]
enum Outgoing {
    Request { id: u64, request: Request, reply: oneshot::Sender<Reply> },
    Message(FromAgent),
}

impl Greeted {
    /// Dials the hub and reads its challenge.
    pub(crate) async fn dial(hub: &HubUrl) -> Result<Self> {
        let mut config = WebSocketConfig::default();
        config.read_buffer_size = 4096;
        config.write_buffer_size = 0;
        config.max_message_size = Some(MAX_CONTROL_BYTES);
        config.max_frame_size = Some(MAX_CONTROL_BYTES);
        let socket = hub.open(control::AGENT_PATH, &[], config).await?;
        let mut greeted =
            Self { socket, authority: hub.authority(), nonce: Nonce([0; 32]), moved: false };
        let FromHub::Challenge { version, nonce } = greeted.read().await? else {
            return Err(no_hub());
        };
        if version != control::CONTROL_VERSION {
            return Err(Error::new(
                ErrorKind::HubUnreachable,
                format_args!(
                    "the hub speaks version {version} of the protocol, this program speaks 1"
                ),
            )
            .hint("update the older of the two"));
        }
        greeted.nonce = nonce;
        Ok(greeted)
    }

    /// What the login says of this agent's sockets of before: that they lead nowhere any more.
    pub(crate) fn after_move(self, moved: bool) -> Self {
        Self { moved, ..self }
    }

    /// Asks for what belongs to an invite, proving that it is held; the code itself stays here.
    pub(crate) async fn redeem(
        &mut self,
        workspace_id: WorkspaceId,
        keys: &InviteKeys,
    ) -> Result<Invitation> {
        let agent_nonce = Nonce(random::bytes());
        let invite_key = keys.signing.public();
        let subject = CredentialId::of(&invite_key);
        let text = control::proof_text(
            &self.authority,
            &self.nonce,
            &agent_nonce,
            &subject.0,
            &workspace_id,
        );
        self.write(&FromAgent::Redeem(Redeem {
            authority: self.authority.clone(),
            agent_nonce,
            workspace_id,
            invite_key,
            signature: keys.signing.sign_text(REDEEM_KIND, &text),
        }))
        .await?;
        let FromHub::Invitation { genesis, credential, wrap } = self.read().await? else {
            return Err(no_hub());
        };
        Ok(Invitation { genesis, credential, wrap })
    }

    /// Logs in as the agent of a workspace; `create` makes the workspace first. A certificate that a
    /// signer left at the hub is taken over on the way.
    pub(crate) async fn login(
        mut self,
        workspace: &Workspace,
        kind: SessionKind,
        create: Option<CreateWorkspace>,
    ) -> Result<(Session, mpsc::Receiver<Incoming>)> {
        self.show(&workspace.identity(), kind, create).await?;
        let mut answer = self.read().await?;
        if let FromHub::Renewed { certificate } = &answer {
            workspace.renew(certificate)?;
            self.show(&workspace.identity(), kind, None).await?;
            answer = self.read().await?;
        }
        let FromHub::Welcome { encodings, displaced, .. } = answer else {
            return Err(no_hub());
        };
        Ok(Session::start(self.socket, encodings, displaced))
    }

    /// Shows and proves who the agent is.
    async fn show(
        &mut self,
        identity: &Identity,
        kind: SessionKind,
        create: Option<CreateWorkspace>,
    ) -> Result<()> {
        let agent_nonce = Nonce(random::bytes());
        let workspace_id = identity.workspace_id();
        let text = control::proof_text(
            &self.authority,
            &self.nonce,
            &agent_nonce,
            &identity.agent_id.0,
            &workspace_id,
        );
        self.write(&FromAgent::Login(Box::new(Login {
            authority: self.authority.clone(),
            agent_nonce,
            session: kind,
            workspace_id,
            presented: identity.noise.presented.to_blobs(),
            wrap_key: Blob(identity.wrap.public().encode()),
            signature: identity.signing.sign_text(LOGIN_KIND, &text),
            create,
            moved: self.moved,
        })))
        .await
    }

    /// Asks for a part of the trust log, for whoever redeemed an invite.
    pub(crate) async fn fetch_log(&mut self, have: Vec<Head>) -> Result<(Vec<Blob>, bool)> {
        self.write(&FromAgent::Request { id: 0, request: Request::Log { have } }).await?;
        let FromHub::Reply { reply, .. } = self.read().await? else {
            return Err(no_hub());
        };
        match reply {
            Reply::Error(report) => Err(Error::from_hub(&report)),
            Reply::Log { entries, more, .. } => Ok((entries, more)),
            Reply::Done
            | Reply::Services { .. }
            | Reply::Agents { .. }
            | Reply::TunnelAccepted { .. }
            | Reply::Beats { .. }
            | Reply::MissingWraps { .. }
            | Reply::Wrap { .. }
            | Reply::Credentials { .. }
            | Reply::Audit { .. }
            | Reply::ApiKeyCreated { .. }
            | Reply::ApiKeys { .. } => Err(no_hub()),
        }
    }

    /// The next message; an error that the hub reports is one here.
    async fn read(&mut self) -> Result<FromHub> {
        let next = async {
            loop {
                match self.socket.next().await {
                    Some(Ok(Message::Text(text))) => {
                        return control::decode(text.as_str()).map_err(|_| no_hub());
                    }
                    Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                    Some(Ok(_)) => return Err(no_hub()),
                    Some(Err(error)) => return Err(lost(&error)),
                    None => return Err(lost("closed the connection")),
                }
            }
        };
        let message =
            timeout(LOGIN_TIMEOUT, next).await.unwrap_or_else(|_| Err(lost("does not answer")))?;
        if let FromHub::Error(report) = &message {
            return Err(Error::from_hub(report));
        }
        Ok(message)
    }

    async fn write(&mut self, message: &FromAgent) -> Result<()> {
        let text = Message::text(control::encode(message));
        self.socket.send(text).await.map_err(|error| lost(&error))
    }
}

fn no_hub() -> Error {
    Error::new(ErrorKind::HubUnreachable, "something answers, but it does not speak this protocol")
        .hint("is this a Private Connect ZK hub?")
}

fn lost(cause: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::HubUnreachable, format_args!("the connection to the hub failed: {cause}"))
}

impl Session {
    fn start(
        socket: HubSocket,
        encodings: Vec<Encoding>,
        displaced: bool,
    ) -> (Self, mpsc::Receiver<Incoming>) {
        let (outgoing, requests) = mpsc::channel(QUEUE);
        let (events, incoming) = mpsc::channel(QUEUE);
        let task = tokio::spawn(async move {
            let ended = drive(socket, requests, &events).await;
            // Nobody listens any more when the session was dropped; then there is nobody to tell.
            let _ = events.send(Incoming::Closed(ended)).await;
        });
        let next_id = AtomicU64::new(1);
        let session = Self { outgoing, next_id, encodings, displaced, task: task.abort_handle() };
        (session, incoming)
    }

    /// What data sockets of this hub may carry.
    pub(crate) fn encodings(&self) -> &[Encoding] {
        &self.encodings
    }

    /// Whether the hub had another session of this agent, which is over now.
    pub(crate) fn has_displaced(&self) -> bool {
        self.displaced
    }

    /// Asks the hub and waits for its answer.
    ///
    /// # Errors
    /// What the hub answered, or [`ErrorKind::HubUnreachable`].
    pub(crate) async fn request(&self, request: Request) -> Result<Reply> {
        let reply = self.try_request(request).await?;
        if let Reply::Error(report) = &reply {
            return Err(Error::from_hub(report));
        }
        Ok(reply)
    }

    /// As [`Session::request`], with the hub's own error in the reply.
    pub(crate) async fn try_request(&self, request: Request) -> Result<Reply> {
        let (reply, answer) = oneshot::channel();
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let sent = self.outgoing.send(Outgoing::Request { id, request, reply }).await;
        sent.map_err(|_| lost("closed"))?;
        match timeout(REPLY_TIMEOUT, answer).await {
            Ok(Ok(reply)) => Ok(reply),
            Ok(Err(_)) => Err(lost("closed")),
            Err(_) => Err(lost("does not answer")),
        }
    }

    /// Tells the hub something that it does not answer.
    pub(crate) async fn tell(&self, message: FromAgent) -> Result<()> {
        self.outgoing.send(Outgoing::Message(message)).await.map_err(|_| lost("closed"))
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// When the hub was heard of, and what it owes us.
struct Silence {
    heard: Instant,
    /// The first request since then.
    asked: Option<Instant>,
    /// Whether a ping went out since then.
    probed: bool,
}

impl Silence {
    fn begin() -> Self {
        Self { heard: Instant::now(), asked: None, probed: false }
    }

    /// Until when the hub may be silent: then a ping is due, or the session is dead.
    fn until(&self) -> Instant {
        let after = if self.probed { REPLY_TIMEOUT } else { PROBE_AFTER };
        let dead_at = self.heard + CONTROL_DEAD_AFTER;
        self.asked.map_or(dead_at, |asked| dead_at.min(asked + after))
    }

    /// Whether a ping is due, now that [`Silence::until`] is over.
    fn probe(&mut self) -> bool {
        let is_dead = Instant::now() >= self.heard + CONTROL_DEAD_AFTER;
        !is_dead && self.asked.is_some() && !std::mem::replace(&mut self.probed, true)
    }
}

/// Runs the socket until it ends; requests that are open then are dropped, which their callers see.
async fn drive(
    socket: HubSocket,
    mut requests: mpsc::Receiver<Outgoing>,
    events: &mpsc::Sender<Incoming>,
) -> Ended {
    let (mut sink, mut stream) = socket.split();
    let mut open: BTreeMap<u64, oneshot::Sender<Reply>> = BTreeMap::new();
    let mut restarting = None;
    let mut silence = Silence::begin();
    let ended = |restarting: Option<Duration>, cause: String| match restarting {
        Some(wait) => Ended::Restarting(wait),
        None => Ended::Lost(cause),
    };
    loop {
        tokio::select! {
            outgoing = requests.recv() => {
                let message = match outgoing {
                    Some(Outgoing::Request { id, request, reply }) => {
                        open.retain(|_, waiting| !waiting.is_closed());
                        open.insert(id, reply);
                        silence.asked.get_or_insert_with(Instant::now);
                        FromAgent::Request { id, request }
                    }
                    Some(Outgoing::Message(message)) => message,
                    None => return Ended::Lost("session dropped".into()),
                };
                if let Err(error) = sink.send(Message::text(control::encode(&message))).await {
                    return ended(restarting, error.to_string());
                }
            }
            () = sleep_until(silence.until()) => {
                if !silence.probe() {
                    return ended(restarting, "the hub is silent".into());
                }
                if let Err(error) = sink.send(Message::Ping(Bytes::new())).await {
                    return ended(restarting, error.to_string());
                }
            }
            received = stream.next() => {
                silence = Silence::begin();
                let text = match received {
                    Some(Ok(Message::Text(text))) => text,
                    // A ping is answered by the library when the socket is next used.
                    Some(Ok(Message::Ping(_))) => {
                        if let Err(error) = sink.flush().await {
                            return ended(restarting, error.to_string());
                        }
                        continue;
                    }
                    Some(Ok(Message::Pong(_))) => continue,
                    Some(Ok(_)) | None => return ended(restarting, "closed by the hub".into()),
                    Some(Err(error)) => return ended(restarting, error.to_string()),
                };
                match control::decode(text.as_str()) {
                    Ok(FromHub::Reply { id, reply }) => {
                        if let Some(waiting) = open.remove(&id) {
                            // The asker may have given up.
                            let _ = waiting.send(reply);
                        }
                    }
                    // Hints both: one that is lost among too many is made up for by the next.
                    Ok(FromHub::LogGrew { head }) => drop(events.try_send(Incoming::LogGrew(head))),
                    Ok(FromHub::WrapStored { .. }) => drop(events.try_send(Incoming::WrapStored)),
                    Ok(FromHub::ShareMade { .. }) => drop(events.try_send(Incoming::ShareMade)),
                    Ok(FromHub::IncomingTunnel { initiator, request, ticket }) => {
                        let tunnel = Incoming::Tunnel { initiator, request, ticket };
                        // An agent that is too slow to answer loses requests, never the session.
                        if events.try_send(tunnel).is_err() {
                            tracing::warn!("too many tunnels are asked for at once; one was dropped");
                        }
                    }
                    Ok(FromHub::Restarting { reconnect_in_ms }) => {
                        let wait = Duration::from_millis(reconnect_in_ms.into());
                        restarting = Some(wait.min(MAX_RESTART_PAUSE));
                    }
                    Ok(FromHub::Error(ErrorReport { code: ErrorCode::Displaced, .. })) => {
                        return Ended::Displaced;
                    }
                    Ok(FromHub::Error(report)) => return Ended::Lost(Error::from_hub(&report).message),
                    Ok(FromHub::Challenge { .. } | FromHub::Invitation { .. } | FromHub::Welcome { .. } | FromHub::Renewed { .. })
                    | Err(_) => {
                        tracing::debug!("the hub sent a message that is not understood; ignored");
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::dial::Upgrading;
    use tokio_tungstenite::{WebSocketStream, tungstenite::protocol::Role};

    /// A session, and the hub's end of its socket.
    async fn session()
    -> (Session, mpsc::Receiver<Incoming>, WebSocketStream<tokio::io::DuplexStream>) {
        let (near, far) = tokio::io::duplex(64 * 1024);
        let near = Upgrading::upgraded(Box::new(near));
        let near = WebSocketStream::from_raw_socket(near, Role::Client, None).await;
        let far = WebSocketStream::from_raw_socket(far, Role::Server, None).await;
        let (session, incoming) = Session::start(near, Vec::new(), false);
        (session, incoming, far)
    }

    /// How long a session lives; the hub's end is read when `reads`, so that pings are answered.
    async fn lives(asks: bool, reads: bool) -> Duration {
        let (session, mut incoming, mut hub) = session().await;
        let reading = tokio::spawn(async move {
            while reads && matches!(hub.next().await, Some(Ok(_))) && hub.flush().await.is_ok() {}
            std::future::pending::<()>().await;
        });
        let start = Instant::now();
        let asking = async {
            if asks {
                let asked = session.request(Request::OwnWrap { epoch: 0 }).await;
                assert_eq!(
                    asked.map_err(|error| error.kind).err(),
                    Some(ErrorKind::HubUnreachable)
                );
            }
        };
        let (ended, ()) = tokio::join!(incoming.recv(), asking);
        assert!(
            matches!(ended, Some(Incoming::Closed(Ended::Lost(why))) if why.contains("silent"))
        );
        reading.abort();
        start.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn hub_that_only_rests_is_given_time_and_a_dead_one_is_given_up() {
        assert_eq!(lives(false, true).await, CONTROL_DEAD_AFTER);
        assert_eq!(lives(true, false).await, REPLY_TIMEOUT);
    }

    #[tokio::test(start_paused = true)]
    async fn hub_whose_database_is_slow_is_no_dead_hub() {
        // The pong comes 5 s after the request.
        assert_eq!(lives(true, true).await, PROBE_AFTER + CONTROL_DEAD_AFTER);
    }
}

//! One control socket: challenge, proof, then requests and tunnels until somebody closes.

use std::{sync::Arc, time::Instant};

use bytes::Bytes;
use connect_spec::{
    control::{
        CONTROL_VERSION, ControlError, ErrorCode, ErrorReport, FromAgent, FromHub, Login, Nonce,
        Reply, Request, SessionKind, TunnelRequest, close, decode, encode,
    },
    encoding::Encoding,
    ids::{AgentId, ServiceId, WorkspaceId},
    keys::ML_KEM_768_CT_BYTES,
    limits::{
        CONTROL_DEAD_AFTER, CONTROL_JITTER, CONTROL_KEEPALIVE, LOGIN_TIMEOUT, MAX_CONTROL_BYTES,
        MAX_HANDSHAKE_BYTES,
    },
};
use futures_util::{SinkExt as _, StreamExt as _};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::mpsc,
    time::{Instant as TokioInstant, interval_at, sleep_until, timeout, timeout_at},
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        self, Message,
        protocol::{CloseFrame, Role, WebSocketConfig},
    },
};

use crate::{
    auth::{self, Admission, Denied, LoggedIn},
    effects,
    hub::{Hub, Mail, random},
    limits::{
        CONTROL_BUFFER_BYTES, FAREWELL_LIMIT, MAX_LOG_READS, MAX_WAITING_REQUESTS, RESTART_PAUSE,
        SEND_LIMIT,
    },
    log,
    metrics::Credential,
    requests,
    router::{Member, OpenError, Parties, SessionId},
    server::Visitor,
};

/// Messages of one batch on the way out.
const BATCH: usize = 32;

/// How a session ends.
#[derive(Debug)]
enum Ending {
    /// The agent closed, or its connection is gone.
    Gone,
    /// We close with this code, after saying why.
    Close(u16, Option<ErrorReport>),
}

impl Ending {
    fn report(report: ErrorReport) -> Self {
        Self::Close(close_code(report.code), Some(report))
    }

    fn bad_request(message: &str) -> Self {
        Self::report(ErrorReport::new(ErrorCode::BadRequest, message))
    }
}

/// The code that closes a control socket after an error.
fn close_code(code: ErrorCode) -> u16 {
    match code {
        ErrorCode::BadRequest | ErrorCode::UnsupportedVersion | ErrorCode::Unknown => {
            close::BAD_REQUEST
        }
        ErrorCode::WrongAuthority
        | ErrorCode::Unauthorized
        | ErrorCode::UnknownWorkspace
        | ErrorCode::RegistrationClosed
        | ErrorCode::AlreadyExists
        | ErrorCode::InviteUnknown
        | ErrorCode::InviteUsed
        | ErrorCode::InviteExpired
        | ErrorCode::Clone
        | ErrorCode::Stale
        | ErrorCode::NameTaken
        | ErrorCode::NotFound
        | ErrorCode::Offline
        | ErrorCode::Forbidden
        | ErrorCode::IssuerUnknown
        | ErrorCode::Conflict
        | ErrorCode::UpgradeNeeded
        | ErrorCode::Refused => close::UNAUTHORIZED,
        ErrorCode::Revoked => close::REVOKED,
        ErrorCode::Busy | ErrorCode::RateLimited | ErrorCode::Internal => close::BUSY,
        ErrorCode::Timeout => close::TIMEOUT,
        ErrorCode::Displaced => close::DISPLACED,
        ErrorCode::Restarting => close::RESTARTING,
    }
}

/// What a session's worker does with the store, one after the other. Boxed on its way, as [`Mail`] is.
#[derive(Debug)]
enum Job {
    Answer { id: u64, request: Request },
    WhyNotOnline { id: u64, service: ServiceId, responder: AgentId },
}

/// A control socket as WebSocket messages.
struct Socket<S> {
    stream: WebSocketStream<S>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Socket<S> {
    async fn new(io: S, early: Bytes) -> Self {
        let config = WebSocketConfig::default()
            .read_buffer_size(CONTROL_BUFFER_BYTES)
            .write_buffer_size(CONTROL_BUFFER_BYTES)
            .max_message_size(Some(MAX_CONTROL_BYTES))
            .max_frame_size(Some(MAX_CONTROL_BYTES));
        let stream =
            WebSocketStream::from_partially_read(io, early.to_vec(), Role::Server, Some(config))
                .await;
        Self { stream }
    }

    /// The next message; `None` for a ping or pong, which the library answers.
    async fn receive(&mut self) -> Result<Option<FromAgent>, Ending> {
        match self.stream.next().await {
            Some(Ok(Message::Text(text))) => match decode(&text) {
                Ok(message) => Ok(Some(message)),
                Err(ControlError::TooLong) => Err(Ending::Close(close::TOO_BIG, None)),
                Err(ControlError::Malformed) => {
                    Err(Ending::bad_request("not a message of this protocol"))
                }
            },
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => Ok(None),
            Some(Ok(Message::Binary(_))) => Err(Ending::Close(close::UNSUPPORTED, None)),
            Some(Ok(Message::Close(_) | Message::Frame(_))) | None => Err(Ending::Gone),
            Some(Err(tungstenite::Error::Capacity(_))) => Err(Ending::Close(close::TOO_BIG, None)),
            Some(Err(tungstenite::Error::Protocol(_) | tungstenite::Error::Utf8(_))) => {
                Err(Ending::Close(close::PROTOCOL, None))
            }
            Some(Err(_)) => Err(Ending::Gone),
        }
    }

    async fn send(&mut self, messages: impl IntoIterator<Item = Message>) -> Result<(), Ending> {
        let send = async {
            for message in messages {
                self.stream.feed(message).await?;
            }
            self.stream.flush().await
        };
        match timeout(SEND_LIMIT, send).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(Ending::Gone),
        }
    }

    async fn say(&mut self, message: &FromHub) -> Result<(), Ending> {
        self.send([text(message)]).await
    }

    /// Says goodbye and waits until the agent has read it, or for a short while.
    async fn end(mut self, ending: Ending) {
        let Ending::Close(code, report) = ending else {
            // The library has queued an answer to the close frame, if there was one.
            let _ = timeout(FAREWELL_LIMIT, self.stream.flush()).await;
            return;
        };
        let goodbye = async {
            if let Some(report) = report {
                self.stream.feed(text(&FromHub::Error(report))).await?;
            }
            self.stream.close(Some(CloseFrame { code: code.into(), reason: "".into() })).await?;
            while let Some(Ok(_)) = self.stream.next().await {}
            Ok::<_, tungstenite::Error>(())
        };
        // A socket that fails or dawdles here is gone either way.
        let _ = timeout(FAREWELL_LIMIT, goodbye).await;
    }
}

fn text(message: &FromHub) -> Message {
    Message::text(encode(message))
}

/// Serves one control socket to its end.
pub async fn serve<S>(hub: Arc<Hub>, io: S, early: Bytes, visitor: Visitor)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut socket = Socket::new(io, early).await;
    let admitted = tokio::select! {
        admitted = authenticate(&hub, &mut socket, &visitor) => admitted,
        () = hub.stopped() => Err(Ending::Close(close::RESTARTING, None)),
    };
    let ending = match admitted {
        Ok((kind, moved, logged_in)) => {
            visitor.admit();
            if moved && kind == SessionKind::Agent {
                hub.route(|router, out| router.handle_moved(logged_in.member.key, out));
            }
            run(&hub, &mut socket, kind, logged_in).await
        }
        Err(ending) => ending,
    };
    if let Ending::Close(code, report) = &ending {
        let reason = report.as_ref().map(|report| report.code);
        tracing::debug!(code, ?reason, "closing a control socket");
    }
    socket.end(ending).await;
}

/// Challenge and proof. Before the login the holder of an invite may ask for its credential and for the
/// trust log.
async fn authenticate<S>(
    hub: &Hub,
    socket: &mut Socket<S>,
    visitor: &Visitor,
) -> Result<(SessionKind, bool, LoggedIn), Ending>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let Some(nonce) = random().map(Nonce) else {
        return Err(Ending::report(ErrorReport::new(
            ErrorCode::Internal,
            "the hub has no randomness",
        )));
    };
    socket.say(&FromHub::Challenge { version: CONTROL_VERSION, nonce }).await?;
    let context = hub.context(&nonce, visitor.address());
    let mut redeemed = None;
    let mut log_reads = 0;
    let mut renewed = false;
    let mut deadline = TokioInstant::now() + LOGIN_TIMEOUT;
    loop {
        let until = deadline;
        let step = async {
            match socket.receive().await? {
                None => {}
                // One invite a connection: whoever tries many pays for a connection each.
                Some(FromAgent::Redeem(redeem)) if redeemed.is_none() => {
                    may_try(hub, visitor)?;
                    let redeeming = Box::pin(auth::redeem(context, &redeem)).await;
                    let invitation = redeeming
                        .map_err(|error| denied(hub, visitor, Credential::Invite, error))?;
                    socket.say(&invitation).await?;
                    redeemed = Some(redeem.workspace_id);
                }
                Some(FromAgent::Request { id, request: Request::Log { have } })
                    if log_reads < MAX_LOG_READS
                        && let Some(workspace) = redeemed =>
                {
                    let reading = Box::pin(log::read(hub, workspace, &have));
                    let reply = requests::reply(reading.await);
                    socket.say(&FromHub::Reply { id, reply }).await?;
                    log_reads += 1;
                    // A long log takes longer than a login.
                    deadline = TokioInstant::now() + LOGIN_TIMEOUT;
                }
                Some(FromAgent::Login(login)) => {
                    may_try(hub, visitor)?;
                    let Login { session, moved, .. } = *login;
                    // Boxed, as everything that waits for the store: the session's own state stays small.
                    let judged = Box::pin(auth::login(context, &login)).await;
                    let judged =
                        judged.map_err(|error| denied(hub, visitor, Credential::Login, error))?;
                    match judged {
                        Admission::In(logged_in) => return Ok(Some((session, moved, logged_in))),
                        Admission::Renewed(certificate) if !renewed => {
                            socket.say(&FromHub::Renewed { certificate }).await?;
                            renewed = true;
                        }
                        Admission::Renewed(_) => {
                            return Err(Ending::report(ErrorReport::new(
                                ErrorCode::Stale,
                                "the hub knows a newer certificate of this agent",
                            )));
                        }
                    }
                }
                Some(
                    FromAgent::Redeem(_)
                    | FromAgent::Request { .. }
                    | FromAgent::AcceptTunnel { .. }
                    | FromAgent::RefuseTunnel { .. },
                ) => return Err(Ending::bad_request("log in first")),
            }
            Ok(None)
        };
        match timeout_at(until, step).await {
            Ok(Ok(None)) => {}
            Ok(Ok(Some(admitted))) => return Ok(admitted),
            Ok(Err(ending)) => return Err(ending),
            Err(_) => {
                let report = ErrorReport::new(ErrorCode::Timeout, "no login in time");
                return Err(Ending::report(report));
            }
        }
    }
}

/// An address that failed too often has to wait.
fn may_try(hub: &Hub, visitor: &Visitor) -> Result<(), Ending> {
    visitor.may_try().map_err(|refusal| {
        hub.metrics().note_refused(refusal.reason);
        let report = ErrorReport::new(
            ErrorCode::RateLimited,
            "too many tries from this address failed; come back later",
        );
        Ending::report(report.retry_in(refusal.retry_in))
    })
}

/// What becomes of a try that failed. Only what looks like guessing is held against the address.
fn denied(hub: &Hub, visitor: &Visitor, shown: Credential, denied: Denied) -> Ending {
    let report = match denied {
        Denied::Report(report) => report,
        Denied::Store(error) => return Ending::report(requests::store_trouble(&error)),
    };
    let wrong = if matches!(report.code, ErrorCode::Unauthorized | ErrorCode::InviteUnknown) {
        Some(shown)
    } else if report.code == ErrorCode::RegistrationClosed {
        Some(Credential::RegistrationToken)
    } else {
        None
    };
    if let Some(wrong) = wrong {
        hub.metrics().note_failure(wrong);
        visitor.note_failure();
    }
    Ending::report(report)
}

/// A session of the router, forgotten when dropped.
struct Session<'h> {
    hub: &'h Hub,
    id: SessionId,
    workspace: WorkspaceId,
    agent: AgentId,
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        self.hub.log_out(self.id, self.workspace);
    }
}

/// The session after the login.
async fn run<S>(hub: &Hub, socket: &mut Socket<S>, kind: SessionKind, logged_in: LoggedIn) -> Ending
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let LoggedIn { member, services, head } = logged_in;
    let (workspace, agent) = member.key;
    let Some((id, mut mailbox, displaced)) = hub.log_in(member.clone(), kind, services) else {
        return Ending::report(requests::busy(
            "this agent has too many sessions, try again when its commands are done",
        ));
    };
    let session = Session { hub, id, workspace, agent };
    tracing::debug!(%agent, ?kind, displaced, "logged in");
    // What was appended between the check of the login and this session's place in the router ended
    // nobody that was not there: judge once more. A farewell waits in the mailbox then.
    let newest = hub.trust().head(workspace);
    if newest != Some(head)
        && let Err(error) = Box::pin(effects::judge(hub, workspace, &[agent])).await
    {
        return Ending::report(requests::store_trouble(&error));
    }
    let head = newest.unwrap_or(head);
    let welcome =
        FromHub::Welcome { head, encodings: vec![Encoding::Base64, Encoding::Binary], displaced };
    if let Err(ending) = socket.say(&welcome).await {
        return ending;
    }

    let (jobs, waiting) = mpsc::channel(MAX_WAITING_REQUESTS);
    let (answers, mut answered) = mpsc::channel(1);
    let worker = work(hub, &member, waiting, answers);
    let mut worker = std::pin::pin!(worker);
    let mut pings = interval_at(TokioInstant::now() + keepalive(), keepalive());
    let mut heard = TokioInstant::now();
    let mut batch = Vec::with_capacity(BATCH);
    loop {
        let result = tokio::select! {
            received = socket.receive() => {
                heard = TokioInstant::now();
                match received {
                    Ok(None) => Ok(()),
                    Ok(Some(message)) => match handle(&session, message, &jobs) {
                        Ok(None) => Ok(()),
                        Ok(Some(reply)) => socket.say(&reply).await,
                        Err(ending) => Err(ending),
                    },
                    Err(ending) => Err(ending),
                }
            }
            count = mailbox.recv_many(&mut batch, BATCH) => {
                if count == 0 {
                    return Ending::report(requests::busy("this agent does not read its messages"));
                }
                deliver(socket, &mut batch).await
            }
            Some(answer) = answered.recv() => socket.say(&answer).await,
            () = &mut worker => Err(Ending::Gone),
            _ = pings.tick() => socket.send([Message::Ping(Bytes::new())]).await,
            () = sleep_until(heard + CONTROL_DEAD_AFTER) => Err(Ending::Close(close::TIMEOUT, None)),
            () = hub.stopped() => {
                let pause = RESTART_PAUSE + random_part(RESTART_PAUSE);
                let reconnect_in_ms = u32::try_from(pause.as_millis()).unwrap_or(u32::MAX);
                let said = socket.say(&FromHub::Restarting { reconnect_in_ms }).await;
                said.and(Err(Ending::Close(close::RESTARTING, None)))
            }
        };
        if let Err(ending) = result {
            return ending;
        }
    }
}

/// Sends a batch of mail up to a goodbye.
async fn deliver<S>(socket: &mut Socket<S>, batch: &mut Vec<Mail>) -> Result<(), Ending>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut messages = Vec::with_capacity(batch.len());
    let mut goodbye = Ok(());
    for mail in batch.drain(..) {
        match mail {
            Mail::Message(message) => messages.push(text(&message)),
            Mail::Goodbye(report, code) => {
                goodbye = Err(Ending::Close(code, Some(*report)));
                break;
            }
        }
    }
    socket.send(messages).await?;
    goodbye
}

/// Handles one message; a reply that is known at once is returned.
fn handle(
    session: &Session<'_>,
    message: FromAgent,
    jobs: &mpsc::Sender<Box<Job>>,
) -> Result<Option<FromHub>, Ending> {
    match message {
        FromAgent::Request { id, request: Request::OpenTunnel(request) } => {
            Ok(open(session, id, request, jobs))
        }
        FromAgent::Request { id, request } => Ok(enqueue(jobs, id, Job::Answer { id, request })),
        FromAgent::AcceptTunnel { tunnel_id, message } => {
            if message.0.len() > MAX_HANDSHAKE_BYTES + ML_KEM_768_CT_BYTES {
                return Err(Ending::bad_request("the handshake message is too long"));
            }
            if let Some(random) = random() {
                let now = Instant::now();
                session.hub.route(|router, out| {
                    router.handle_accept(session.id, tunnel_id, message, random, now, out)
                });
            }
            Ok(None)
        }
        FromAgent::RefuseTunnel { tunnel_id, code } => {
            session.hub.route(|router, out| router.handle_refuse(session.id, tunnel_id, code, out));
            Ok(None)
        }
        FromAgent::Redeem(_) | FromAgent::Login(_) => Err(Ending::bad_request("logged in already")),
    }
}

/// Asks the exposer for a tunnel; a reply that is known at once is returned.
fn open(
    session: &Session<'_>,
    id: u64,
    request: TunnelRequest,
    jobs: &mpsc::Sender<Box<Job>>,
) -> Option<FromHub> {
    let refuse = |report| Some(FromHub::Reply { id, reply: Reply::Error(report) });
    if request.message.0.len() > MAX_HANDSHAKE_BYTES {
        return refuse(ErrorReport::new(
            ErrorCode::BadRequest,
            "the handshake message is too long",
        ));
    }
    // What cannot be recorded is not begun. What was begun goes on.
    if !session.hub.store().is_up() {
        return refuse(requests::busy(
            "the hub's database is away: open connections go on, new tunnels wait until it is back",
        ));
    }
    let Some(random) = random() else {
        return refuse(ErrorReport::new(ErrorCode::Internal, "the hub has no randomness"));
    };
    let (service, responder) = (request.service_id, request.responder);
    let opened = match session.hub.check_load(session.workspace) {
        Ok(()) => session.hub.route(|router, out| {
            router.handle_open(session.id, id, request, random, Instant::now(), out)
        }),
        Err(report) => Err(OpenError::Refused(report)),
    };
    match opened {
        Ok(()) => None,
        Err(OpenError::Refused(report)) => {
            let parties =
                Parties { reacher: session.agent, exposer: responder, service, share: None };
            session.hub.note(session.workspace, parties.refused(report.code));
            refuse(report)
        }
        Err(OpenError::NotOnline) => {
            enqueue(jobs, id, Job::WhyNotOnline { id, service, responder })
        }
    }
}

/// Leaves a job to the worker; refuses when too many wait.
fn enqueue(jobs: &mpsc::Sender<Box<Job>>, id: u64, job: Job) -> Option<FromHub> {
    jobs.try_send(job.into()).err().map(|_| FromHub::Reply {
        id,
        reply: Reply::Error(requests::busy("too many requests of this session wait")),
    })
}

/// Answers the session's requests to the store in their order, beside its other messages.
async fn work(
    hub: &Hub,
    member: &Member,
    mut jobs: mpsc::Receiver<Box<Job>>,
    answers: mpsc::Sender<Box<FromHub>>,
) {
    while let Some(job) = jobs.recv().await {
        let (id, reply) = match *job {
            Job::Answer { id, request } => {
                (id, Box::pin(requests::answer(hub, member, request)).await)
            }
            Job::WhyNotOnline { id, service, responder } => {
                let why = requests::why_not_online(hub, member, service, responder);
                (id, Box::pin(why).await)
            }
        };
        if answers.send(FromHub::Reply { id, reply }.into()).await.is_err() {
            return;
        }
    }
}

/// Keepalive with jitter, so that agents that came together are not pinged together.
fn keepalive() -> std::time::Duration {
    CONTROL_KEEPALIVE + random_part(CONTROL_JITTER)
}

/// Anything from nothing to `whole`.
fn random_part(whole: std::time::Duration) -> std::time::Duration {
    let [byte, ..] = random().unwrap_or([128; 32]);
    whole * u32::from(byte) / 255
}

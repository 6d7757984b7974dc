//! The network, or the hub itself, as an enemy would run it: stands between agents and the real hub,
//! reads every WebSocket message, and changes what it likes.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use connect_spec::control::{self, AGENT_PATH, FromAgent, FromHub};
use futures_util::{SinkExt, StreamExt};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    task::{AbortHandle, JoinSet},
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Message, protocol::Role},
};

use crate::{hub::Hub, runtime};

/// A message on its way; the rule changes it in place.
#[derive(Debug)]
pub enum Passing<'m> {
    /// On a control socket, to the hub.
    ToHub(&'m mut FromAgent),
    /// On a control socket, to the agent.
    ToAgent(&'m mut FromHub),
    /// On a data socket.
    Data(Data<'m>),
}

/// A packet on its way.
#[derive(Debug)]
pub struct Data<'m> {
    /// Number of the data socket, counted from 0.
    pub socket: usize,
    /// Whether the agent behind this relay sent it, or is to get it.
    pub from_agent: bool,
    /// Its number in this direction of this socket, from 0.
    pub number: usize,
    /// The packet.
    pub message: &'m mut Message,
}

/// A control connection through the relay, and the way to say something in the name of either side.
/// Clones are the same connection.
#[derive(Debug, Clone)]
pub struct Session {
    /// Its number, counted from 0.
    pub number: usize,
    to_agent: mpsc::UnboundedSender<Message>,
    to_hub: mpsc::UnboundedSender<Message>,
}

impl Session {
    /// Says something to the agent in the hub's name. It goes out after what is on its way.
    pub fn tell_agent(&self, message: &FromHub) {
        // Nobody hears it when the connection is over.
        let _ = self.to_agent.send(Message::text(control::encode(message)));
    }

    /// Says something to the hub in the agent's name.
    pub fn tell_hub(&self, message: &FromAgent) {
        let _ = self.to_hub.send(Message::text(control::encode(message)));
    }
}

/// What becomes of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It goes on, as it is now.
    Forward,
    /// It vanishes.
    Drop,
    /// It goes on twice.
    Twice,
    /// It waits for the next one and goes on behind it.
    Swap,
    /// It goes on after this time, and what follows it too.
    Delay(Duration),
    /// It goes back to its sender.
    Reflect,
}

/// Data sockets have no session.
type Rule = dyn FnMut(Option<&Session>, Passing<'_>) -> Verdict + Send;

/// What passed, if it is recorded.
#[derive(Debug, Clone, Default)]
struct Wire(Option<Arc<Mutex<Vec<u8>>>>);

impl Wire {
    fn recording() -> Self {
        Self(Some(Arc::default()))
    }

    fn record(&self, bytes: &[u8]) {
        if let Self(Some(wire)) = self {
            wire.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        }
    }
}

struct Shared {
    hub: SocketAddr,
    rule: Mutex<Box<Rule>>,
    control_sockets: AtomicUsize,
    data_sockets: AtomicUsize,
    wire: Wire,
}

/// Between tries to accept when the system has no file left for it.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A relay that runs until it is dropped.
#[derive(Debug)]
pub struct HostileRelay {
    address: SocketAddr,
    wire: Wire,
    task: AbortHandle,
}

impl HostileRelay {
    /// Stands in front of a hub, changes what passes by a rule, and records the wire.
    pub fn start(hub: &Hub, mut rule: impl FnMut(Passing<'_>) -> Verdict + Send + 'static) -> Self {
        Self::with_sessions(hub, move |_, passing| rule(passing))
    }

    /// As [`HostileRelay::start`], by a rule that knows on which connection a message passes.
    pub fn with_sessions(
        hub: &Hub,
        rule: impl FnMut(Option<&Session>, Passing<'_>) -> Verdict + Send + 'static,
    ) -> Self {
        let bound = runtime().block_on(TcpListener::bind("127.0.0.1:0"));
        let listener = bound.expect("a free port");
        Self::serve(listener, hub.address(), Wire::recording(), rule).expect("it is bound")
    }

    /// Listens on `listen` in front of any hub, and records nothing.
    ///
    /// # Errors
    /// When the address cannot be had.
    pub async fn listen(
        listen: SocketAddr,
        hub: SocketAddr,
        rule: impl FnMut(Option<&Session>, Passing<'_>) -> Verdict + Send + 'static,
    ) -> io::Result<Self> {
        Self::serve(TcpListener::bind(listen).await?, hub, Wire::default(), rule)
    }

    fn serve(
        listener: TcpListener,
        hub: SocketAddr,
        wire: Wire,
        rule: impl FnMut(Option<&Session>, Passing<'_>) -> Verdict + Send + 'static,
    ) -> io::Result<Self> {
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            hub,
            rule: Mutex::new(Box::new(rule)),
            control_sockets: AtomicUsize::new(0),
            data_sockets: AtomicUsize::new(0),
            wire: wire.clone(),
        });
        let task = runtime().spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                tokio::select! {
                    accepted = listener.accept() => {
                        let Ok((agent, _)) = accepted else {
                            tokio::time::sleep(ACCEPT_PAUSE).await;
                            continue;
                        };
                        let shared = shared.clone();
                        connections.spawn(async move {
                            // Either side may vanish at any time.
                            let _ = shared.pass(agent).await;
                        });
                    }
                    Some(_) = connections.join_next() => {}
                }
            }
        });
        Ok(Self { address, wire, task: task.abort_handle() })
    }

    /// Changes nothing, and records the wire.
    #[must_use]
    pub fn honest(hub: &Hub) -> Self {
        Self::start(hub, |_| Verdict::Forward)
    }

    /// For `connect init --hub`.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Everything that passed until now, heads and unmasked messages.
    #[must_use]
    pub fn recorded(&self) -> Vec<u8> {
        let wire = self.wire.0.as_ref();
        wire.map(|wire| wire.lock().unwrap_or_else(PoisonError::into_inner).clone())
            .unwrap_or_default()
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for HostileRelay {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Reads an HTTP head; returns it, and what came after it.
async fn read_head(from: &mut TcpStream) -> io::Result<(Vec<u8>, Vec<u8>)> {
    let mut head = Vec::new();
    loop {
        if from.read_buf(&mut head).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if let Some(end) = head.windows(4).position(|four| four == b"\r\n\r\n") {
            let rest = head.split_off(end + 4);
            return Ok((head, rest));
        }
    }
}

impl Shared {
    fn judge(&self, session: Option<&Session>, passing: Passing<'_>) -> Verdict {
        (self.rule.lock().unwrap_or_else(PoisonError::into_inner))(session, passing)
    }

    /// One connection: its upgrade is passed on as it is, then message by message.
    async fn pass(&self, mut agent: TcpStream) -> io::Result<()> {
        let mut hub = TcpStream::connect(self.hub).await?;
        agent.set_nodelay(true)?;
        hub.set_nodelay(true)?;
        let (request, early) = read_head(&mut agent).await?;
        self.wire.record(&request);
        hub.write_all(&request).await?;
        let (response, answer) = read_head(&mut hub).await?;
        self.wire.record(&response);
        agent.write_all(&response).await?;
        if !response.starts_with(b"HTTP/1.1 101") {
            agent.write_all(&answer).await?;
            tokio::io::copy_bidirectional(&mut agent, &mut hub).await?;
            return Ok(());
        }
        let agent = WebSocketStream::from_partially_read(agent, early, Role::Server, None).await;
        let hub = WebSocketStream::from_partially_read(hub, answer, Role::Client, None).await;
        let (agent_sink, agent_stream) = agent.split();
        let (hub_sink, hub_stream) = hub.split();
        let (to_agent, said_to_agent) = mpsc::unbounded_channel();
        let (to_hub, said_to_hub) = mpsc::unbounded_channel();
        let up = Direction { said: said_to_hub, back: to_agent.clone() };
        let down = Direction { said: said_to_agent, back: to_hub.clone() };
        if request.starts_with(format!("GET {AGENT_PATH} ").as_bytes()) {
            let number = self.control_sockets.fetch_add(1, Ordering::SeqCst);
            let session = &Session { number, to_agent, to_hub };
            let to_hub = |message: &mut Message| self.to_hub(session, message);
            let to_agent = |message: &mut Message| self.to_agent(session, message);
            tokio::select! {
                () = self.forward(agent_stream, hub_sink, up, to_hub) => {}
                () = self.forward(hub_stream, agent_sink, down, to_agent) => {}
            }
        } else {
            let socket = self.data_sockets.fetch_add(1, Ordering::SeqCst);
            let counted = |from_agent| {
                let mut next = 0;
                move |message: &mut Message| {
                    let number = next;
                    next += 1;
                    self.judge(None, Passing::Data(Data { socket, from_agent, number, message }))
                }
            };
            tokio::select! {
                () = self.forward(agent_stream, hub_sink, up, counted(true)) => {}
                () = self.forward(hub_stream, agent_sink, down, counted(false)) => {}
            }
        }
        Ok(())
    }

    fn to_hub(&self, session: &Session, message: &mut Message) -> Verdict {
        // What is not understood here is for the other side to judge.
        let Ok(mut said) = control::decode::<FromAgent>(message.to_text().unwrap_or_default())
        else {
            return Verdict::Forward;
        };
        let verdict = self.judge(Some(session), Passing::ToHub(&mut said));
        *message = Message::text(control::encode(&said));
        verdict
    }

    fn to_agent(&self, session: &Session, message: &mut Message) -> Verdict {
        let Ok(mut said) = control::decode::<FromHub>(message.to_text().unwrap_or_default()) else {
            return Verdict::Forward;
        };
        let verdict = self.judge(Some(session), Passing::ToAgent(&mut said));
        *message = Message::text(control::encode(&said));
        verdict
    }

    /// One direction of a socket, and what is said in the sender's name.
    async fn forward(
        &self,
        mut from: impl StreamExt<Item = tokio_tungstenite::tungstenite::Result<Message>> + Unpin,
        mut to: impl SinkExt<Message> + Unpin,
        mut direction: Direction,
        mut judge: impl FnMut(&mut Message) -> Verdict,
    ) {
        let mut waiting = None;
        loop {
            let message = tokio::select! {
                biased;
                message = from.next() => message,
                Some(said) = direction.said.recv() => {
                    self.wire.record(&said.clone().into_data());
                    if to.send(said).await.is_err() {
                        return;
                    }
                    continue;
                }
            };
            let Some(Ok(mut message)) = message else {
                break;
            };
            let verdict = match &message {
                Message::Text(_) | Message::Binary(_) => {
                    self.wire.record(&message.clone().into_data());
                    judge(&mut message)
                }
                // The library answers pings on each side of this relay; who waits for one gets it too.
                Message::Pong(_) => continue,
                Message::Ping(_) | Message::Close(_) | Message::Frame(_) => Verdict::Forward,
            };
            if let Verdict::Delay(time) = verdict {
                tokio::time::sleep(time).await;
            }
            if verdict == Verdict::Reflect {
                // Its sender may be gone.
                let _ = direction.back.send(message);
                continue;
            }
            for message in verdict.apply(message, &mut waiting) {
                if to.send(message).await.is_err() {
                    return;
                }
            }
        }
        // What the other side of the close says still has to come through.
        let _ = to.close().await;
    }
}

/// What goes into one direction of a socket besides what comes, and the way back.
struct Direction {
    said: mpsc::UnboundedReceiver<Message>,
    back: mpsc::UnboundedSender<Message>,
}

impl Verdict {
    /// What goes on, in order.
    fn apply(
        self,
        message: Message,
        waiting: &mut Option<Message>,
    ) -> impl Iterator<Item = Message> + use<> {
        let out = match self {
            Self::Forward | Self::Delay(_) => [Some(message), waiting.take()],
            Self::Drop | Self::Reflect => [None, None],
            Self::Twice => [Some(message.clone()), Some(message)],
            Self::Swap => {
                *waiting = Some(message);
                [None, None]
            }
        };
        out.into_iter().flatten()
    }
}

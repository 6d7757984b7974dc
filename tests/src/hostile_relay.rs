//! The network, or the hub itself, as an enemy would run it: stands between agents and the real hub,
//! reads every WebSocket message, and changes what it likes.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use connect_spec::control::{self, AGENT_PATH, FromAgent, FromHub};
use futures_util::{SinkExt, StreamExt};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
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
}

type Rule = dyn FnMut(Passing<'_>) -> Verdict + Send;

#[derive(Debug, Clone, Default)]
struct Wire(Arc<Mutex<Vec<u8>>>);

struct Shared {
    hub: SocketAddr,
    rule: Mutex<Box<Rule>>,
    data_sockets: AtomicUsize,
    wire: Wire,
}

/// A relay that runs until it is dropped.
#[derive(Debug)]
pub struct HostileRelay {
    address: SocketAddr,
    wire: Wire,
    task: AbortHandle,
}

impl HostileRelay {
    /// Stands in front of a hub and changes what passes by a rule.
    pub fn start(hub: &Hub, rule: impl FnMut(Passing<'_>) -> Verdict + Send + 'static) -> Self {
        let listener = runtime().block_on(TcpListener::bind("127.0.0.1:0")).expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let wire = Wire::default();
        let shared = Arc::new(Shared {
            hub: hub.address(),
            rule: Mutex::new(Box::new(rule)),
            data_sockets: AtomicUsize::new(0),
            wire: wire.clone(),
        });
        let task = runtime().spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                tokio::select! {
                    accepted = listener.accept() => {
                        let (agent, _) = accepted.expect("accepting goes on");
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
        Self { address, wire, task: task.abort_handle() }
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
        self.wire.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
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
    fn record(&self, bytes: &[u8]) {
        self.wire.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
    }

    fn judge(&self, passing: Passing<'_>) -> Verdict {
        (self.rule.lock().unwrap_or_else(PoisonError::into_inner))(passing)
    }

    /// One connection: its upgrade is passed on as it is, then message by message.
    async fn pass(&self, mut agent: TcpStream) -> io::Result<()> {
        let mut hub = TcpStream::connect(self.hub).await?;
        agent.set_nodelay(true)?;
        hub.set_nodelay(true)?;
        let (request, early) = read_head(&mut agent).await?;
        self.record(&request);
        hub.write_all(&request).await?;
        let (response, answer) = read_head(&mut hub).await?;
        self.record(&response);
        agent.write_all(&response).await?;
        if !response.starts_with(b"HTTP/1.1 101") {
            agent.write_all(&answer).await?;
            tokio::io::copy_bidirectional(&mut agent, &mut hub).await?;
            return Ok(());
        }
        let is_control = request.starts_with(format!("GET {AGENT_PATH} ").as_bytes());
        let socket =
            if is_control { None } else { Some(self.data_sockets.fetch_add(1, Ordering::SeqCst)) };
        let agent = WebSocketStream::from_partially_read(agent, early, Role::Server, None).await;
        let hub = WebSocketStream::from_partially_read(hub, answer, Role::Client, None).await;
        let (agent_sink, agent_stream) = agent.split();
        let (hub_sink, hub_stream) = hub.split();
        tokio::select! {
            () = self.messages(agent_stream, hub_sink, socket, true) => {}
            () = self.messages(hub_stream, agent_sink, socket, false) => {}
        }
        Ok(())
    }

    async fn messages(
        &self,
        mut from: impl StreamExt<Item = tokio_tungstenite::tungstenite::Result<Message>> + Unpin,
        mut to: impl SinkExt<Message> + Unpin,
        socket: Option<usize>,
        from_agent: bool,
    ) {
        let mut number = 0;
        let mut waiting = None;
        while let Some(Ok(mut message)) = from.next().await {
            if let Message::Text(_) | Message::Binary(_) = message {
                self.record(&message.clone().into_data());
            }
            let verdict = match (&message, socket) {
                (Message::Text(_) | Message::Binary(_), Some(socket)) => {
                    number += 1;
                    let message = &mut message;
                    self.judge(Passing::Data(Data {
                        socket,
                        from_agent,
                        number: number - 1,
                        message,
                    }))
                }
                (Message::Text(text), None) if from_agent => {
                    let mut control: FromAgent = control::decode(text).expect("our own agent");
                    let verdict = self.judge(Passing::ToHub(&mut control));
                    message = Message::text(control::encode(&control));
                    verdict
                }
                (Message::Text(text), None) => {
                    let mut control: FromHub = control::decode(text).expect("our own hub");
                    let verdict = self.judge(Passing::ToAgent(&mut control));
                    message = Message::text(control::encode(&control));
                    verdict
                }
                // The libraries on both sides of this relay answer pings themselves.
                (Message::Ping(_) | Message::Pong(_), _) => continue,
                (Message::Binary(_) | Message::Close(_) | Message::Frame(_), _) => Verdict::Forward,
            };
            let out = match verdict {
                Verdict::Forward => [Some(message), waiting.take()],
                Verdict::Drop => [None, None],
                Verdict::Twice => [Some(message.clone()), Some(message)],
                Verdict::Swap => {
                    waiting = Some(message);
                    [None, None]
                }
            };
            for message in out.into_iter().flatten() {
                if to.send(message).await.is_err() {
                    return;
                }
            }
        }
        // What the other side of the close says still has to come through.
        let _ = to.close().await;
    }
}

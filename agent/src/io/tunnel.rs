//! Drives one channel over one data socket, and lends its streams to the rest of the program.
//!
//! One task per tunnel opens and seals every record; streams touch the channel under its lock and
//! wake that task. Nothing here waits while it holds the lock.

use std::{
    collections::BTreeMap,
    io,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use connect_crypto::transport::{Opener, Sealer};
use connect_spec::{
    control::TICKET_SCHEME,
    control::{TUNNEL_PATH, Ticket},
    encoding::{self, Encoding},
    limits::MAX_DATA_FRAME_BYTES,
    record::{CloseCode, ResetCode, StreamId},
};
use futures_util::{
    SinkExt, StreamExt,
    stream::{SplitSink, SplitStream},
};
use http::{
    HeaderValue,
    header::{AUTHORIZATION, SEC_WEBSOCKET_PROTOCOL},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::{Notify, mpsc, watch},
    time::{sleep_until, timeout_at},
};
use tokio_tungstenite::tungstenite::{Bytes, Message, protocol::WebSocketConfig};

use super::dial::{HubSocket, HubUrl};
use crate::{
    engine::channel::{Channel, CloseReason, Event, Read, Side, StreamError},
    error::Result,
    random,
};

/// Read buffer of a data socket: a few records.
const READ_BUFFER: usize = 128 * 1024;
/// Records collect up to this size before they are written, unless nothing more is ready.
const WRITE_BUFFER: usize = 64 * 1024;
/// Keepalives are spread over this much time.
const JITTER_MILLIS: u32 = 3000;
/// How long the last records of a closing tunnel may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// Opens the data socket of one end of a tunnel.
///
/// # Errors
/// As [`HubUrl::open`].
pub(crate) async fn open_data_socket(
    hub: &HubUrl,
    ticket: &Ticket,
    encoding: Encoding,
) -> Result<HubSocket> {
    let mut config = WebSocketConfig::default();
    config.read_buffer_size = READ_BUFFER;
    config.write_buffer_size = WRITE_BUFFER;
    config.max_message_size = Some(MAX_DATA_FRAME_BYTES);
    config.max_frame_size = Some(MAX_DATA_FRAME_BYTES);
    let mut authorization = HeaderValue::try_from(format!("{TICKET_SCHEME} {}", ticket.reveal()))
        .expect("a ticket is hex");
    authorization.set_sensitive(true);
    let headers = [
        (AUTHORIZATION, authorization),
        (SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(encoding.subprotocol())),
    ];
    hub.open(TUNNEL_PATH, &headers, config).await
}

/// How a tunnel is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Status {
    /// Waiting for HELLO or WELCOME.
    Greeting,
    /// Keys are confirmed; `round_trip` is there once an encrypted ping was answered.
    Established { round_trip: Option<Duration> },
    /// Over, and the last record is sent.
    Closed,
}

/// Why a tunnel ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum End {
    /// The channel ended.
    #[error(transparent)]
    Channel(#[from] CloseReason),
    /// The data socket ended without a close record.
    #[error("the data connection was lost: {0}")]
    Socket(String),
    /// A packet did not open: it was changed on the way, or made up.
    #[error("a packet was altered on the way")]
    Tampered,
}

/// One tunnel; clones share it.
#[derive(Debug, Clone)]
pub(crate) struct Tunnel(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    inner: Mutex<Inner>,
    transmit: Notify,
    status: watch::Sender<Status>,
}

#[derive(Debug)]
struct Inner {
    channel: Channel,
    wakers: BTreeMap<StreamId, Wakers>,
    /// Where incoming streams go; `None` for a reacher.
    incoming: Option<mpsc::UnboundedSender<StreamId>>,
    ended: Option<CloseReason>,
}

#[derive(Debug, Default)]
struct Wakers {
    read: Option<Waker>,
    write: Option<Waker>,
}

impl Tunnel {
    /// The reacher's end.
    pub(crate) fn reacher() -> Self {
        Self::new(Side::Reacher, None)
    }

    /// The exposer's end, and the streams that the reacher opens. Their number is bounded by the
    /// channel, so the queue of them is too.
    pub(crate) fn exposer() -> (Self, mpsc::UnboundedReceiver<StreamId>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (Self::new(Side::Exposer, Some(sender)), receiver)
    }

    fn new(side: Side, incoming: Option<mpsc::UnboundedSender<StreamId>>) -> Self {
        let jitter = Duration::from_millis((random::number() % JITTER_MILLIS).into());
        Self(Arc::new(Shared {
            inner: Mutex::new(Inner {
                channel: Channel::new(side, Instant::now(), jitter),
                wakers: BTreeMap::new(),
                incoming,
                ended: None,
            }),
            transmit: Notify::new(),
            status: watch::Sender::new(Status::Greeting),
        }))
    }

    /// Opens a stream; the exposer dials while the first bytes already travel.
    ///
    /// # Errors
    /// [`StreamError`] when the channel is over or full.
    pub(crate) fn open_stream(&self) -> std::result::Result<Stream, StreamError> {
        let id = self.with(Channel::open)?;
        Ok(Stream { tunnel: self.clone(), id })
    }

    /// Takes over a stream that the reacher opened.
    pub(crate) fn incoming_stream(&self, id: StreamId) -> Stream {
        Stream { tunnel: self.clone(), id }
    }

    /// Ends the channel and says why.
    pub(crate) fn close(&self, code: CloseCode) {
        self.with(|channel| channel.close(code));
    }

    /// Streams that are open now.
    pub(crate) fn open_streams(&self) -> usize {
        self.lock().channel.open_streams()
    }

    /// How the tunnel is doing, as it changes.
    pub(crate) fn status(&self) -> watch::Receiver<Status> {
        self.0.status.subscribe()
    }

    /// Waits until the tunnel is over and its last record sent.
    pub(crate) async fn closed(&self) {
        // The sender lives as long as this handle.
        let _ = self.status().wait_for(|status| *status == Status::Closed).await;
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A panic elsewhere cannot leave the channel in a worse state than a lost tunnel.
        self.0.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `act` on the channel, then tells whom its effects concern.
    fn with<T>(&self, act: impl FnOnce(&mut Channel) -> T) -> T {
        let mut inner = self.lock();
        let result = act(&mut inner.channel);
        self.after(inner);
        result
    }

    fn after(&self, mut inner: MutexGuard<'_, Inner>) {
        while let Some(event) = inner.channel.poll_event() {
            self.dispatch(&mut inner, event);
        }
        if inner.channel.wants_transmit() || inner.channel.is_closed() {
            drop(inner);
            self.0.transmit.notify_one();
        }
    }

    fn dispatch(&self, inner: &mut Inner, event: Event) {
        match event {
            Event::Established => {
                self.0.status.send_replace(Status::Established { round_trip: None });
            }
            Event::Ponged(round_trip) => {
                self.0.status.send_replace(Status::Established { round_trip: Some(round_trip) });
            }
            Event::Incoming(stream) => {
                let sent = inner.incoming.as_ref().map(|incoming| incoming.send(stream));
                if !matches!(sent, Some(Ok(()))) {
                    inner.channel.release(stream);
                }
            }
            Event::Readable(stream) => {
                if let Some(waker) = inner.wakers.get_mut(&stream).and_then(|w| w.read.take()) {
                    waker.wake();
                }
            }
            Event::Writable(stream) => {
                if let Some(waker) = inner.wakers.get_mut(&stream).and_then(|w| w.write.take()) {
                    waker.wake();
                }
            }
            Event::Closed(reason) => {
                tracing::debug!(%reason, "channel closed");
                inner.incoming = None;
                inner.ended = Some(reason);
            }
        }
    }

    /// Runs the tunnel until it ends.
    pub(crate) async fn run(
        &self,
        socket: HubSocket,
        encoding: Encoding,
        sealer: Sealer,
        opener: Opener,
    ) -> End {
        let (sink, stream) = socket.split();
        let end = tokio::select! {
            end = self.receive(stream, opener) => end,
            end = self.transmit(sink, encoding, sealer) => end,
        };
        // Whatever ended the tunnel, nobody may wait for it any longer.
        self.with(|channel| channel.close(CloseCode::Normal));
        self.0.status.send_replace(Status::Closed);
        end
    }

    async fn receive(&self, mut stream: SplitStream<HubSocket>, mut opener: Opener) -> End {
        let (mut packet, mut record) = (Vec::new(), Vec::new());
        loop {
            let opened = match stream.next().await {
                Some(Ok(Message::Binary(bytes))) => opener.open(&bytes, &mut record),
                Some(Ok(Message::Text(text))) => {
                    if encoding::decode_base64(text.as_bytes(), &mut packet).is_err() {
                        return End::Tampered;
                    }
                    opener.open(&packet, &mut record)
                }
                Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => continue,
                Some(Ok(Message::Close(frame))) => {
                    let why = frame.map_or_else(String::new, |frame| {
                        format!("closed by the hub with code {}", u16::from(frame.code))
                    });
                    return End::Socket(why);
                }
                Some(Err(error)) => return End::Socket(error.to_string()),
                None => return End::Socket("closed".into()),
            };
            if opened.is_err() {
                return End::Tampered;
            }
            let mut inner = self.lock();
            inner.channel.handle_record(Instant::now(), &record);
            self.after(inner);
        }
    }

    async fn transmit(
        &self,
        mut sink: SplitSink<HubSocket, Message>,
        encoding: Encoding,
        mut sealer: Sealer,
    ) -> End {
        let (mut record, mut packet) = (Vec::new(), Vec::new());
        loop {
            loop {
                let now = Instant::now();
                if !self.lock().channel.poll_transmit(now, &mut record) {
                    break;
                }
                if sealer.seal(&record, &mut packet).is_err() {
                    return End::Socket("the key of this tunnel is used up".into());
                }
                let message = match encoding {
                    Encoding::Base64 => Message::text(encoding::encode_base64(&packet)),
                    Encoding::Binary => Message::Binary(Bytes::copy_from_slice(&packet)),
                };
                if let Err(error) = sink.feed(message).await {
                    return End::Socket(error.to_string());
                }
            }
            if let Err(error) = sink.flush().await {
                return End::Socket(error.to_string());
            }
            let (ended, deadline) = {
                let inner = self.lock();
                (inner.ended, inner.channel.poll_timeout())
            };
            if let Some(reason) = ended {
                // The last record is on its way; a peer that does not read it cannot hold us.
                let deadline = tokio::time::Instant::now() + CLOSE_TIMEOUT;
                let _ = timeout_at(deadline, sink.close()).await;
                return End::Channel(reason);
            }
            let timer = async {
                match deadline {
                    Some(deadline) => sleep_until(deadline.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = self.0.transmit.notified() => {}
                () = timer => self.with(|channel| channel.handle_timeout(Instant::now())),
            }
        }
    }
}

/// One stream of a channel: what a TCP connection is on either side of it.
///
/// Dropping it before both directions ended resets it, which the other side's client sees as a
/// connection reset, never as a clean end.
#[derive(Debug)]
pub struct Stream {
    tunnel: Tunnel,
    id: StreamId,
}

impl Stream {
    /// Waits until bytes can be written; returns how many.
    ///
    /// # Errors
    /// When the stream was reset.
    pub(crate) async fn writable(&self) -> io::Result<usize> {
        std::future::poll_fn(|context| {
            let mut inner = self.tunnel.lock();
            match inner.channel.room(self.id) {
                Ok(0) => {
                    inner.wakers.entry(self.id).or_default().write = Some(context.waker().clone());
                    Poll::Pending
                }
                Ok(room) => Poll::Ready(Ok(room)),
                Err(error) => Poll::Ready(Err(to_io(error))),
            }
        })
        .await
    }

    /// Writes bytes for which [`Stream::writable`] found room.
    ///
    /// # Errors
    /// When the stream was reset.
    pub(crate) fn write_now(&self, bytes: &[u8]) -> io::Result<usize> {
        self.tunnel.with(|channel| channel.write(self.id, bytes)).map_err(to_io)
    }

    /// Ends this direction cleanly.
    ///
    /// # Errors
    /// When the stream was reset.
    pub(crate) fn finish(&self) -> io::Result<()> {
        self.tunnel.with(|channel| channel.finish(self.id)).map_err(to_io)
    }

    /// Waits for bytes and reads up to `most` of them; an empty result is the end.
    ///
    /// # Errors
    /// When the stream was reset.
    pub(crate) async fn read_chunk(&self, most: usize) -> io::Result<Vec<u8>> {
        std::future::poll_fn(|context| {
            let mut chunk = Vec::new();
            let mut inner = self.tunnel.lock();
            let waiting = inner.channel.waiting(self.id).min(most);
            chunk.resize(waiting.max(1), 0);
            let read = inner.channel.read(self.id, &mut chunk);
            if matches!(read, Ok(Read::Blocked)) {
                inner.wakers.entry(self.id).or_default().read = Some(context.waker().clone());
                return Poll::Pending;
            }
            self.tunnel.after(inner);
            Poll::Ready(match read {
                Ok(Read::Bytes(length)) => {
                    chunk.truncate(length);
                    Ok(chunk)
                }
                Ok(Read::Finished | Read::Blocked) => Ok(Vec::new()),
                Err(error) => Err(to_io(error)),
            })
        })
        .await
    }

    /// Tells the reacher that the target answered.
    pub(crate) fn opened(&self) {
        self.tunnel.with(|channel| channel.opened(self.id));
    }

    /// Ends both directions at once.
    pub(crate) fn reset(&self, code: ResetCode) {
        self.tunnel.with(|channel| channel.reset(self.id, code));
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let mut inner = self.tunnel.lock();
        inner.wakers.remove(&self.id);
        inner.channel.release(self.id);
        self.tunnel.after(inner);
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut inner = self.tunnel.lock();
        match inner.channel.read(self.id, buffer.initialize_unfilled()) {
            Ok(Read::Bytes(length)) => {
                self.tunnel.after(inner);
                buffer.advance(length);
                Poll::Ready(Ok(()))
            }
            Ok(Read::Finished) => Poll::Ready(Ok(())),
            Ok(Read::Blocked) if buffer.remaining() == 0 => Poll::Ready(Ok(())),
            Ok(Read::Blocked) => {
                inner.wakers.entry(self.id).or_default().read = Some(context.waker().clone());
                Poll::Pending
            }
            Err(error) => Poll::Ready(Err(to_io(error))),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let mut inner = self.tunnel.lock();
        match inner.channel.write(self.id, bytes) {
            Ok(0) if !bytes.is_empty() => {
                inner.wakers.entry(self.id).or_default().write = Some(context.waker().clone());
                Poll::Pending
            }
            Ok(length) => {
                self.tunnel.after(inner);
                Poll::Ready(Ok(length))
            }
            Err(error) => Poll::Ready(Err(to_io(error))),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.finish())
    }
}

fn to_io(error: StreamError) -> io::Error {
    let kind = match error {
        StreamError::Reset(ResetCode::TargetRefused) => io::ErrorKind::ConnectionRefused,
        StreamError::Reset(ResetCode::TargetUnreachable) => io::ErrorKind::HostUnreachable,
        StreamError::Reset(ResetCode::TargetTimeout) => io::ErrorKind::TimedOut,
        StreamError::Reset(
            ResetCode::Aborted | ResetCode::Busy | ResetCode::Lost | ResetCode::Other(_),
        )
        | StreamError::Closed => io::ErrorKind::ConnectionReset,
    };
    io::Error::new(kind, error)
}

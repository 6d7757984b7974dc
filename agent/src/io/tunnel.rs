//! Drives a channel over one data socket after the other, and lends its streams to the rest of the
//! program.
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
    limits::{DEAD_AFTER, MAX_DATA_FRAME_BYTES},
    record::{CloseCode, Record, ResetCode, StreamId},
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
    time::{sleep_until, timeout, timeout_at},
};
use tokio_tungstenite::tungstenite::{self, Bytes, Message, protocol::WebSocketConfig};

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

/// One end of a tunnel: a data socket and the keys for it.
pub(crate) struct TunnelEnd {
    pub(crate) socket: HubSocket,
    pub(crate) encoding: Encoding,
    pub(crate) sealer: Sealer,
    pub(crate) opener: Opener,
}

impl TunnelEnd {
    /// Reads one record before the channel is put on the tunnel. The first one confirms that the peer
    /// has the keys.
    ///
    /// # Errors
    /// [`End`] when the socket ends before, or the record does not open.
    pub(crate) async fn read_record(&mut self) -> std::result::Result<Vec<u8>, End> {
        let (mut packet, mut record) = (Vec::new(), Vec::new());
        receive_record(&mut self.socket, &mut self.opener, &mut packet, &mut record).await?;
        Ok(record)
    }

    /// Sends one record before the channel is put on the tunnel.
    ///
    /// # Errors
    /// [`End`] when the socket fails.
    pub(crate) async fn send_record(
        &mut self,
        record: &Record<'_>,
    ) -> std::result::Result<(), End> {
        let (mut plain, mut packet) = (Vec::new(), Vec::new());
        record.encode(&mut plain);
        self.sealer
            .seal(&plain, &mut packet)
            .map_err(|_| End::Socket("the key of this tunnel is used up".into()))?;
        let sent = self.socket.send(message(self.encoding, &packet)).await;
        sent.map_err(|error| End::Socket(error.to_string()))
    }

    /// Closes the tunnel with a word to the peer; the channel it was for is none of its business.
    pub(crate) async fn refuse(mut self, code: CloseCode) {
        let say = async {
            // A peer that is gone needs no word.
            let _ = self.send_record(&Record::TunnelClose(code)).await;
            let _ = self.socket.close(None).await;
        };
        // A peer that does not read it cannot hold us.
        let _ = timeout(CLOSE_TIMEOUT, say).await;
    }
}

/// How a channel is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Status {
    /// On no tunnel; waiting for the next.
    Detached,
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
    /// The peer closed the tunnel but not the channel.
    #[error("the peer closed the tunnel: {0:?}")]
    Peer(CloseCode),
    /// Nothing was heard for too long.
    #[error("the peer has been silent for {} s", DEAD_AFTER.as_secs())]
    Silent,
    /// A newer tunnel of the channel took over.
    #[error("a newer tunnel took over")]
    Replaced,
    /// The data socket ended without a close record.
    #[error("the data connection was lost: {0}")]
    Socket(String),
    /// A packet did not open: it was changed on the way, or made up.
    #[error("a packet was altered on the way")]
    Tampered,
}

/// One channel; clones share it.
#[derive(Debug, Clone)]
pub(crate) struct ChannelHandle(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    inner: Mutex<Inner>,
    transmit: Notify,
    status: watch::Sender<Status>,
    /// Number of the tunnel that the channel is on; changes when a newer one takes over.
    tunnel: watch::Sender<u64>,
}

#[derive(Debug)]
struct Inner {
    channel: Channel,
    wakers: BTreeMap<StreamId, Wakers>,
    /// Where incoming streams go; `None` for a reacher.
    incoming: Option<mpsc::UnboundedSender<StreamId>>,
    ended: Option<CloseReason>,
    /// The tunnel is of no more use, for this reason.
    over: Option<Option<CloseCode>>,
}

#[derive(Debug, Default)]
struct Wakers {
    read: Option<Waker>,
    write: Option<Waker>,
}

impl ChannelHandle {
    /// The reacher's side.
    pub(crate) fn reacher() -> Self {
        Self::new(Side::Reacher, None)
    }

    /// The exposer's side, and the streams that the reacher opens. Their number is bounded by the
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
                over: None,
            }),
            transmit: Notify::new(),
            status: watch::Sender::new(Status::Detached),
            tunnel: watch::Sender::new(0),
        }))
    }

    /// Opens a stream; the exposer dials while the first bytes already travel.
    ///
    /// # Errors
    /// [`StreamError`] when the channel is over or full.
    pub(crate) fn open_stream(&self) -> std::result::Result<Stream, StreamError> {
        let id = self.with(Channel::open)?;
        Ok(Stream { channel: self.clone(), id })
    }

    /// Takes over a stream that the reacher opened.
    pub(crate) fn incoming_stream(&self, id: StreamId) -> Stream {
        Stream { channel: self.clone(), id }
    }

    /// Ends the channel and says why.
    pub(crate) fn close(&self, code: CloseCode) {
        self.with(|channel| channel.close(code));
    }

    /// Streams that are open now.
    pub(crate) fn open_streams(&self) -> usize {
        self.lock().channel.open_streams()
    }

    /// How the channel is doing, as it changes.
    pub(crate) fn status(&self) -> watch::Receiver<Status> {
        self.0.status.subscribe()
    }

    /// Waits until the peer answered an encrypted ping over the tunnel that is up.
    pub(crate) async fn answered(&self) {
        self.reaches(|status| matches!(status, Status::Established { round_trip: Some(_) })).await;
    }

    /// Waits until the peer confirmed its keys on the tunnel that is up.
    pub(crate) async fn confirmed(&self) {
        self.reaches(|status| matches!(status, Status::Established { .. })).await;
    }

    /// The last round trip over the tunnel that is up.
    pub(crate) fn round_trip(&self) -> Option<Duration> {
        match *self.0.status.borrow() {
            Status::Established { round_trip } => round_trip,
            Status::Detached | Status::Greeting | Status::Closed => None,
        }
    }

    async fn reaches(&self, is_it: impl FnMut(&Status) -> bool) {
        // The sender lives as long as this handle.
        let _ = self.status().wait_for(is_it).await;
    }

    /// When the peer was last heard of.
    pub(crate) fn heard(&self) -> Instant {
        self.lock().channel.heard()
    }

    /// Ends the channel when it has been on no tunnel, and its peer not heard of, for `limit`.
    /// Returns when the channel is over.
    pub(crate) async fn expire_after(&self, limit: Duration) {
        let mut status = self.status();
        loop {
            let parked = |status: &Status| matches!(status, Status::Detached | Status::Closed);
            // The sender lives as long as this handle.
            if status.wait_for(parked).await.is_ok_and(|status| *status == Status::Closed) {
                return;
            }
            let deadline = tokio::time::Instant::from(self.heard() + limit);
            let moved = status.wait_for(|status| *status != Status::Detached);
            if timeout_at(deadline, moved).await.is_err() {
                self.with(Channel::expire);
            }
        }
    }

    /// Waits until the channel is over and its last record sent.
    pub(crate) async fn closed(&self) {
        self.reaches(|status| *status == Status::Closed).await;
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
        if inner.channel.wants_transmit() || inner.ended.is_some() || inner.over.is_some() {
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
                // On a tunnel, the last record is still to be sent.
                self.0.status.send_if_modified(|status| {
                    let detached = *status == Status::Detached;
                    if detached {
                        *status = Status::Closed;
                    }
                    detached
                });
            }
            Event::TunnelOver(code) => inner.over = Some(code),
        }
    }

    /// Puts the channel on a tunnel and runs it until the tunnel ends. A tunnel that it was on before
    /// is dropped at once. `first` is a record that was read already.
    pub(crate) async fn run(&self, end: TunnelEnd, first: Option<Vec<u8>>) -> End {
        let TunnelEnd { socket, encoding, sealer, opener } = end;
        let mut newest = self.0.tunnel.subscribe();
        let number = {
            let mut inner = self.lock();
            if let Some(reason) = inner.ended {
                return End::Channel(reason);
            }
            let now = Instant::now();
            inner.over = None;
            inner.channel.attach(now);
            self.0.status.send_replace(Status::Greeting);
            self.0.tunnel.send_modify(|number| *number += 1);
            let number = *self.0.tunnel.borrow();
            if let Some(first) = first {
                inner.channel.handle_record(now, &first);
            }
            self.after(inner);
            number
        };
        let (sink, stream) = socket.split();
        let end = tokio::select! {
            end = self.receive(number, stream, opener) => end,
            end = self.transmit(sink, encoding, sealer) => end,
            _ = newest.wait_for(|newest| *newest != number) => End::Replaced,
        };
        let mut inner = self.lock();
        if *self.0.tunnel.borrow() != number {
            return end;
        }
        let status = if inner.ended.is_some() { Status::Closed } else { Status::Detached };
        inner.channel.detach();
        self.0.status.send_replace(status);
        match (end, inner.ended, inner.over) {
            // The record that says why came just before the socket ended.
            (End::Socket(_), Some(reason), _) => End::Channel(reason),
            (End::Socket(_), None, Some(Some(code))) => End::Peer(code),
            (end, _, _) => end,
        }
    }

    async fn receive(
        &self,
        number: u64,
        mut stream: SplitStream<HubSocket>,
        mut opener: Opener,
    ) -> End {
        let (mut packet, mut record) = (Vec::new(), Vec::new());
        loop {
            let received = receive_record(&mut stream, &mut opener, &mut packet, &mut record).await;
            if let Err(end) = received {
                return end;
            }
            let mut inner = self.lock();
            if *self.0.tunnel.borrow() != number {
                return End::Replaced;
            }
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
                if let Err(error) = sink.feed(message(encoding, &packet)).await {
                    return End::Socket(error.to_string());
                }
            }
            if let Err(error) = sink.flush().await {
                return End::Socket(error.to_string());
            }
            let (ended, over, deadline) = {
                let inner = self.lock();
                (inner.ended, inner.over, inner.channel.poll_timeout())
            };
            if ended.is_some() || over.is_some() {
                // The last record is on its way; a peer that does not read it cannot hold us.
                let _ = timeout(CLOSE_TIMEOUT, sink.close()).await;
                return match (ended, over) {
                    (Some(reason), _) => End::Channel(reason),
                    (None, Some(Some(code))) => End::Peer(code),
                    (None, _) => End::Silent,
                };
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

/// A sealed record as the WebSocket carries it.
fn message(encoding: Encoding, packet: &[u8]) -> Message {
    match encoding {
        Encoding::Base64 => Message::text(encoding::encode_base64(packet)),
        Encoding::Binary => Message::Binary(Bytes::copy_from_slice(packet)),
    }
}

/// Receives and opens one record; `packet` is a buffer that is used again and again.
async fn receive_record(
    stream: &mut (impl futures_util::Stream<Item = tungstenite::Result<Message>> + Unpin),
    opener: &mut Opener,
    packet: &mut Vec<u8>,
    record: &mut Vec<u8>,
) -> std::result::Result<(), End> {
    loop {
        let opened = match stream.next().await {
            Some(Ok(Message::Binary(bytes))) => opener.open(&bytes, record),
            Some(Ok(Message::Text(text))) => {
                if encoding::decode_base64(text.as_bytes(), packet).is_err() {
                    return Err(End::Tampered);
                }
                opener.open(packet, record)
            }
            Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => continue,
            Some(Ok(Message::Close(frame))) => {
                let why = frame.map_or_else(
                    || "closed by the hub".to_owned(),
                    |frame| format!("closed by the hub with code {}", u16::from(frame.code)),
                );
                return Err(End::Socket(why));
            }
            Some(Err(error)) => return Err(End::Socket(error.to_string())),
            None => return Err(End::Socket("closed".into())),
        };
        return opened.map_err(|_| End::Tampered);
    }
}

/// One stream of a channel: what a TCP connection is on either side of it.
///
/// Dropping it before both directions ended resets it, which the other side's client sees as a
/// connection reset, never as a clean end.
#[derive(Debug)]
pub struct Stream {
    channel: ChannelHandle,
    id: StreamId,
}

impl Stream {
    /// Waits until bytes can be written; returns how many.
    ///
    /// # Errors
    /// When the stream was reset.
    pub(crate) async fn writable(&self) -> io::Result<usize> {
        std::future::poll_fn(|context| {
            let mut inner = self.channel.lock();
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

    /// Writes all of `bytes`, as room for them comes. What [`Stream::writable`] found may be gone:
    /// the streams of a channel share it, and others write meanwhile.
    ///
    /// # Errors
    /// When the stream was reset.
    pub(crate) async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        loop {
            let taken = self.channel.with(|channel| channel.write(self.id, bytes));
            bytes = &bytes[taken.map_err(to_io)?..];
            if bytes.is_empty() {
                return Ok(());
            }
            self.writable().await?;
        }
    }

    /// Ends this direction cleanly.
    ///
    /// # Errors
    /// When the stream was reset.
    pub(crate) fn finish(&self) -> io::Result<()> {
        self.channel.with(|channel| channel.finish(self.id)).map_err(to_io)
    }

    /// Waits for bytes and reads up to `most` of them; an empty result is the end.
    ///
    /// # Errors
    /// When the stream was reset.
    pub(crate) async fn read_chunk(&self, most: usize) -> io::Result<Vec<u8>> {
        std::future::poll_fn(|context| {
            let mut chunk = Vec::new();
            let mut inner = self.channel.lock();
            let waiting = inner.channel.waiting(self.id).min(most);
            chunk.resize(waiting.max(1), 0);
            let read = inner.channel.read(self.id, &mut chunk);
            if matches!(read, Ok(Read::Blocked)) {
                inner.wakers.entry(self.id).or_default().read = Some(context.waker().clone());
                return Poll::Pending;
            }
            self.channel.after(inner);
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
        self.channel.with(|channel| channel.opened(self.id));
    }

    /// Ends both directions at once.
    pub(crate) fn reset(&self, code: ResetCode) {
        self.channel.with(|channel| channel.reset(self.id, code));
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let mut inner = self.channel.lock();
        inner.wakers.remove(&self.id);
        inner.channel.release(self.id);
        self.channel.after(inner);
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut inner = self.channel.lock();
        match inner.channel.read(self.id, buffer.initialize_unfilled()) {
            Ok(Read::Bytes(length)) => {
                self.channel.after(inner);
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
        let mut inner = self.channel.lock();
        match inner.channel.write(self.id, bytes) {
            Ok(0) if !bytes.is_empty() => {
                inner.wakers.entry(self.id).or_default().write = Some(context.waker().clone());
                Poll::Pending
            }
            Ok(length) => {
                self.channel.after(inner);
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

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use futures_util::FutureExt;

    use super::*;

    #[tokio::test]
    async fn bytes_whose_room_went_to_other_streams_wait_and_are_not_lost() {
        let channel = ChannelHandle::reacher();
        let stream = channel.open_stream().unwrap();
        let bytes = vec![7; stream.writable().await.unwrap()];
        // No tunnel is up, so what the others write stays, and the room of the channel ends.
        let mut others = Vec::new();
        loop {
            let other = channel.open_stream().unwrap();
            let Some(room) = other.writable().now_or_never() else { break };
            other.write_all(&vec![9; room.unwrap()]).await.unwrap();
            others.push(other);
        }
        let mut writing = pin!(stream.write_all(&bytes));
        assert!(writing.as_mut().now_or_never().is_none(), "there is no room");
        channel.close(CloseCode::Normal);
        assert!(writing.await.is_err(), "and none comes any more");
    }
}

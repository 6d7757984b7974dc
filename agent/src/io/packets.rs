//! A data socket: sealed records, each a WebSocket message (RFC 6455), read and written where they are.
//!
//! A record is composed and sealed in the buffer that goes to the socket, and opened in the buffer
//! that came from it.

use std::{
    future::poll_fn,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Bytes, BytesMut};
use connect_crypto::transport::{Opener, Sealer, TransportError};
use connect_spec::{
    encoding::{self, Encoding},
    frame::{self, Head, MAX_HEAD_BYTES, Opcode, Parsed},
    limits::{MAX_DATA_FRAME_BYTES, TAG_BYTES},
};
use tokio::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::dial::Io;
use crate::random;

/// Read at once: a few records. A buffer lives on for as long as records in it wait to be used.
const READ_BYTES: usize = 128 * 1024;
/// A buffer with less room than this is not read into.
const MIN_READ_BYTES: usize = 16 * 1024;
/// Records collect up to this size before they are written, unless nothing more is ready.
const WRITE_BYTES: usize = 64 * 1024;
/// Masks that are drawn at once: each is of the system's randomness (RFC 6455 section 10.3).
const MASKS: usize = 64;
/// The status of a close that nothing is wrong with (RFC 6455 section 7.4.1).
const NORMAL_CLOSE: u16 = 1000;

/// Why a data socket brings no more records.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PacketError {
    /// The socket failed or ended.
    #[error("{0}")]
    Socket(String),
    /// A packet is none, or does not open.
    #[error("a packet was altered on the way")]
    Tampered,
}

impl From<io::Error> for PacketError {
    fn from(error: io::Error) -> Self {
        Self::Socket(error.to_string())
    }
}

/// One end of a tunnel's data path, at the hub.
pub(crate) struct PacketSocket {
    io: Box<dyn Io>,
    encoding: Encoding,
    inbox: BytesMut,
    /// What came so far of a message in several frames.
    fragments: Option<BytesMut>,
    /// What the hub's latest ping asks to be said; older ones need no answer (RFC 6455 section 5.5.3), so
    /// a hub that pings and does not read fills no memory.
    pong: Option<BytesMut>,
    /// The hub said that nothing more comes.
    closed: bool,
    /// Something was read since [`PacketSocket::rest`] was last asked.
    active: bool,
    outbox: Vec<u8>,
    /// How much of `outbox` is written.
    written: usize,
    /// A record before it becomes text.
    record: Vec<u8>,
    /// Masks that were drawn and not used.
    masks: Vec<[u8; 4]>,
}

impl PacketSocket {
    /// A socket after its upgrade; `early` is what came with the answer to it.
    pub(crate) fn new(io: Box<dyn Io>, early: Bytes, encoding: Encoding) -> Self {
        Self {
            io,
            encoding,
            inbox: BytesMut::from(early),
            fragments: None,
            pong: None,
            closed: false,
            active: false,
            outbox: Vec::new(),
            written: 0,
            record: Vec::new(),
            masks: Vec::new(),
        }
    }

    /// Whether another record should be queued before what is queued is written.
    pub(crate) fn has_room(&self) -> bool {
        self.outbox.len() < WRITE_BYTES
    }

    /// Seals the record that `compose` appends to the buffer it is given, and queues it. Returns the
    /// length of the record, or `None` when `compose` says that it appended none.
    ///
    /// # Errors
    /// When the key is used up.
    pub(crate) fn queue(
        &mut self,
        sealer: &mut Sealer,
        compose: impl FnOnce(&mut Vec<u8>) -> bool,
    ) -> Result<Option<usize>, TransportError> {
        let length;
        match self.encoding {
            Encoding::Binary => {
                // The head is as long as that of all but the shortest records, and is moved for those.
                const HEAD_BYTES: usize = 8;
                let start = self.outbox.len();
                self.outbox.resize(start + HEAD_BYTES, 0);
                if !compose(&mut self.outbox) {
                    self.outbox.truncate(start);
                    return Ok(None);
                }
                length = self.outbox.len() - start - HEAD_BYTES;
                sealer.seal(&mut self.outbox, start + HEAD_BYTES)?;
                let mask = self.next_mask();
                let (head, head_bytes) = head(Opcode::Binary, length + TAG_BYTES, mask);
                self.outbox.drain(start..start + HEAD_BYTES - head_bytes);
                self.outbox[start..start + head_bytes].copy_from_slice(&head[..head_bytes]);
                frame::mask(&mut self.outbox[start + head_bytes..], mask);
            }
            Encoding::Base64 => {
                self.record.clear();
                if !compose(&mut self.record) {
                    return Ok(None);
                }
                length = self.record.len();
                sealer.seal(&mut self.record, 0)?;
                let mask = self.next_mask();
                let text_length = encoding::base64_length(self.record.len());
                let (head, head_bytes) = head(Opcode::Text, text_length, mask);
                self.outbox.extend_from_slice(&head[..head_bytes]);
                let start = self.outbox.len();
                encoding::encode_base64(&self.record, &mut self.outbox);
                frame::mask(&mut self.outbox[start..], mask);
            }
        }
        Ok(Some(length))
    }

    fn queue_control(&mut self, opcode: Opcode, payload: &[u8]) {
        let mask = self.next_mask();
        let (head, head_bytes) = head(opcode, payload.len(), mask);
        self.outbox.extend_from_slice(&head[..head_bytes]);
        let start = self.outbox.len();
        self.outbox.extend_from_slice(payload);
        frame::mask(&mut self.outbox[start..], mask);
    }

    fn next_mask(&mut self) -> [u8; 4] {
        if self.masks.is_empty() {
            let drawn = random::bytes::<{ 4 * MASKS }>();
            self.masks.extend_from_slice(drawn.as_chunks().0);
        }
        self.masks.pop().expect("just drawn")
    }

    /// Writes what is queued.
    pub(crate) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.has_room()
            && let Some(pong) = self.pong.take()
        {
            self.queue_control(Opcode::Pong, &pong);
        }
        if self.outbox.is_empty() {
            return Poll::Ready(Ok(()));
        }
        while self.written < self.outbox.len() {
            let unwritten = &self.outbox[self.written..];
            let written = ready!(Pin::new(&mut self.io).poll_write(cx, unwritten))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.written += written;
        }
        ready!(Pin::new(&mut self.io).poll_flush(cx))?;
        self.outbox.clear();
        self.written = 0;
        Poll::Ready(Ok(()))
    }

    /// Reads once what has arrived.
    ///
    /// # Errors
    /// When the socket failed, or ended.
    pub(crate) fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), PacketError>> {
        let length = self.inbox.len();
        if self.inbox.capacity() - length < MIN_READ_BYTES {
            // No more than that, so that a buffer whose records are all used is used again.
            self.inbox.reserve(READ_BYTES.saturating_sub(length).max(MIN_READ_BYTES));
        }
        let read = std::pin::pin!(self.io.read_buf(&mut self.inbox));
        if ready!(read.poll(cx))? == 0 {
            return Poll::Ready(Err(PacketError::Socket("closed".into())));
        }
        self.active = true;
        Poll::Ready(Ok(()))
    }

    /// Opens the next record of what was read; `None` when the rest of it has not arrived.
    ///
    /// # Errors
    /// When the hub closed the socket or broke the protocol, or the record does not open.
    pub(crate) fn next_record(
        &mut self,
        opener: &mut Opener,
    ) -> Result<Option<Bytes>, PacketError> {
        let Some(mut packet) = self.next_packet()? else {
            return Ok(None);
        };
        if self.encoding == Encoding::Base64 {
            let decoded = encoding::decode_base64(&mut packet).map(|record| record.len());
            packet.truncate(decoded.map_err(|_| PacketError::Tampered)?);
        }
        let opened = opener.open(&mut packet).map(|record| record.len());
        packet.truncate(opened.map_err(|_| PacketError::Tampered)?);
        Ok(Some(packet.freeze()))
    }

    /// The next whole message, unmasked as the hub's are.
    fn next_packet(&mut self) -> Result<Option<BytesMut>, PacketError> {
        loop {
            let head = match Head::parse(&self.inbox, frame::Sender::Server) {
                Ok(Parsed::Head(head, head_bytes))
                    if self.inbox.len() - head_bytes >= head.length =>
                {
                    let _ = self.inbox.split_to(head_bytes);
                    head
                }
                Ok(_) => return Ok(None),
                Err(error) => return Err(PacketError::Socket(error.to_string())),
            };
            let payload = self.inbox.split_to(head.length);
            match (head.opcode, self.fragments.take()) {
                (Opcode::Ping, fragments) => {
                    self.fragments = fragments;
                    self.pong = Some(payload);
                }
                (Opcode::Pong, fragments) => self.fragments = fragments,
                (Opcode::Close, _) => {
                    self.closed = true;
                    return Err(closed_by_hub(&payload));
                }
                (Opcode::Continuation, Some(mut message)) => {
                    if message.len() + payload.len() > MAX_DATA_FRAME_BYTES {
                        return Err(PacketError::Socket("a message is too long".into()));
                    }
                    message.unsplit(payload);
                    if head.fin {
                        return Ok(Some(message));
                    }
                    self.fragments = Some(message);
                }
                (opcode, None) if opcode == data_opcode(self.encoding) => {
                    if head.fin {
                        return Ok(Some(payload));
                    }
                    self.fragments = Some(payload);
                }
                _ => return Err(PacketError::Socket("a frame is out of place".into())),
            }
        }
    }

    /// Gives back the memory that records passed through, if nothing was read since this was last asked:
    /// a socket on which nothing moves needs none.
    pub(crate) fn rest(&mut self) {
        if std::mem::take(&mut self.active) {
            return;
        }
        if self.inbox.is_empty() {
            self.inbox = BytesMut::new();
        }
        if self.outbox.is_empty() {
            self.outbox = Vec::new();
        }
        self.record = Vec::new();
    }

    /// Waits for a record and opens it.
    ///
    /// # Errors
    /// As [`PacketSocket::next_record`], and when the socket ends before.
    pub(crate) async fn receive(&mut self, opener: &mut Opener) -> Result<Bytes, PacketError> {
        loop {
            if let Some(record) = self.next_record(opener)? {
                return Ok(record);
            }
            poll_fn(|cx| self.poll_fill(cx)).await?;
        }
    }

    /// Writes what is queued.
    ///
    /// # Errors
    /// When the socket fails.
    pub(crate) async fn flush(&mut self) -> io::Result<()> {
        poll_fn(|cx| self.poll_flush(cx)).await
    }

    /// Whether the hub said that nothing more comes, and waits for the same in answer.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed
    }

    /// Says that nothing more comes.
    ///
    /// # Errors
    /// When the socket fails.
    pub(crate) async fn close(&mut self) -> io::Result<()> {
        self.queue_control(Opcode::Close, &NORMAL_CLOSE.to_be_bytes());
        self.flush().await?;
        self.io.shutdown().await
    }
}

fn data_opcode(encoding: Encoding) -> Opcode {
    match encoding {
        Encoding::Base64 => Opcode::Text,
        Encoding::Binary => Opcode::Binary,
    }
}

/// The head of a frame of this agent, and how long it is.
fn head(opcode: Opcode, length: usize, mask: [u8; 4]) -> ([u8; MAX_HEAD_BYTES], usize) {
    let mut bytes = [0; MAX_HEAD_BYTES];
    let head_bytes = Head { fin: true, opcode, length, mask: Some(mask) }.write(&mut bytes);
    (bytes, head_bytes)
}

fn closed_by_hub(payload: &[u8]) -> PacketError {
    PacketError::Socket(match payload.first_chunk() {
        Some(code) => format!("closed by the hub with code {}", u16::from_be_bytes(*code)),
        None => "closed by the hub".to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;

    use super::*;

    /// A hub that pings without end and reads nothing gets one answer, when it reads.
    #[tokio::test]
    async fn only_the_latest_ping_is_answered() {
        let (near, mut far) = tokio::io::duplex(1024);
        let pings: Vec<u8> = (0..=u8::MAX).flat_map(|number| [0x89, 1, number]).collect();
        let mut socket = PacketSocket::new(Box::new(near), pings.into(), Encoding::Base64);
        assert!(socket.next_packet().expect("pings only").is_none());
        assert!(socket.outbox.is_empty());
        socket.flush().await.expect("memory");
        drop(socket);
        let mut answer = Vec::new();
        far.read_to_end(&mut answer).await.expect("memory");
        let [0x8a, 0x81, mask, _, _, _, masked] = answer[..] else { panic!("{answer:02x?}") };
        assert_eq!(mask ^ masked, u8::MAX);
    }

    #[tokio::test]
    async fn close_is_noticed_and_answered() {
        let (near, mut far) = tokio::io::duplex(1024);
        let close = Bytes::from_static(&[0x88, 2, 0x11, 0x3a]);
        let mut socket = PacketSocket::new(Box::new(near), close, Encoding::Binary);
        assert!(!socket.is_closed());
        let error = socket.next_packet().expect_err("it is over").to_string();
        assert!(error.contains("4410") && socket.is_closed(), "{error}");
        socket.close().await.expect("memory");
        drop(socket);
        let mut answer = Vec::new();
        far.read_to_end(&mut answer).await.expect("memory");
        let [0x88, 0x82, a, b, _, _, high, low] = answer[..] else { panic!("{answer:02x?}") };
        assert_eq!([a ^ high, b ^ low], NORMAL_CLOSE.to_be_bytes());
    }
}

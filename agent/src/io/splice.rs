//! Joins a TCP connection and a stream, byte for byte, half-close by half-close, reset by reset.

use std::{
    cell::RefCell,
    future::poll_fn,
    io,
    pin::pin,
    task::{Context, Poll, ready},
};

use bytes::{BufMut, Bytes, BytesMut};
use connect_spec::record::ResetCode;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
};

use super::tunnel::Stream;

/// Most bytes moved at once.
const SPLICE_BYTES: usize = 64 * 1024;

thread_local! {
    /// What all connections of a thread read into, so that an idle one has no buffer. What was read is
    /// cut off; the rest is for the next.
    static INBOX: RefCell<BytesMut> = RefCell::default();
}

/// Copies both ways until both directions ended, or one failed.
///
/// A connection that breaks resets the stream; a stream that was reset breaks the connection with
/// RST, so that a client never takes a cut answer for a whole one.
pub(crate) async fn splice(tcp: TcpStream, stream: &Stream) {
    let mut connection = Connection { tcp, ended: false };
    let (reader, writer) = connection.tcp.split();
    // Both directions in one task: an error of either ends the other.
    match tokio::try_join!(to_stream(reader, stream), to_tcp(stream, writer)) {
        Ok(_) => connection.ended = true,
        Err(error) => {
            tracing::debug!(%error, "connection broken");
            stream.reset(ResetCode::Aborted);
        }
    }
}

/// Turns a client away.
pub(crate) fn refuse(tcp: TcpStream) {
    drop(Connection { tcp, ended: false });
}

/// A TCP connection that is broken with RST when it is dropped before both directions ended: a task
/// that is aborted must not look like a clean end either.
struct Connection {
    tcp: TcpStream,
    ended: bool,
}

impl Drop for Connection {
    fn drop(&mut self) {
        if !self.ended {
            // A socket that refuses is gone already.
            let _ = self.tcp.set_zero_linger();
        }
    }
}

async fn to_stream(mut tcp: ReadHalf<'_>, stream: &Stream) -> io::Result<()> {
    loop {
        tcp.readable().await?;
        let room = stream.writable().await?;
        let bytes = poll_fn(|cx| poll_read(cx, &mut tcp, room.min(SPLICE_BYTES))).await?;
        if bytes.is_empty() {
            return stream.finish();
        }
        stream.write_all(bytes).await?;
    }
}

/// Reads at most `most` bytes; none is the end.
fn poll_read(cx: &mut Context<'_>, tcp: &mut ReadHalf<'_>, most: usize) -> Poll<io::Result<Bytes>> {
    INBOX.with_borrow_mut(|inbox| {
        inbox.reserve(SPLICE_BYTES);
        let mut part = (&mut *inbox).limit(most);
        ready!(pin!(tcp.read_buf(&mut part)).poll(cx))?;
        Poll::Ready(Ok(inbox.split().freeze()))
    })
}

async fn to_tcp(stream: &Stream, mut tcp: WriteHalf<'_>) -> io::Result<()> {
    loop {
        let bytes = stream.read(SPLICE_BYTES).await?;
        if bytes.is_empty() {
            return tcp.shutdown().await;
        }
        tcp.write_all(&bytes).await?;
    }
}

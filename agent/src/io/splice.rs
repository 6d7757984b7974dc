//! Joins a TCP connection and a stream, byte for byte, half-close by half-close, reset by reset.

use std::io;

use bytes::BufMut;
use connect_spec::record::ResetCode;
use tokio::{
    io::AsyncWriteExt,
    net::{
        TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
};

use super::tunnel::Stream;

/// Most bytes moved at once; the buffer lives only while bytes move, so an idle connection has none.
const SPLICE_BYTES: usize = 64 * 1024;

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

async fn to_stream(tcp: ReadHalf<'_>, stream: &Stream) -> io::Result<()> {
    loop {
        tcp.readable().await?;
        let room = stream.writable().await?;
        let most = room.min(SPLICE_BYTES);
        let mut buffer = Vec::with_capacity(most).limit(most);
        match tcp.try_read_buf(&mut buffer) {
            Ok(0) => return stream.finish(),
            Ok(_) => {
                stream.write_all(&buffer.into_inner()).await?;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

async fn to_tcp(stream: &Stream, mut tcp: WriteHalf<'_>) -> io::Result<()> {
    loop {
        let chunk = stream.read_chunk(SPLICE_BYTES).await?;
        if chunk.is_empty() {
            return tcp.shutdown().await;
        }
        tcp.write_all(&chunk).await?;
    }
}

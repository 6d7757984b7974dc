//! Who holds a local port, as far as the system tells.

use std::{
    io::{self, ErrorKind},
    net::SocketAddr,
};

use crate::error::{self, Error};

/// Why a port cannot be bound, as the end of "port 5432 …".
pub(crate) fn reason(address: SocketAddr, error: &io::Error) -> String {
    let kind = error.kind();
    if kind == ErrorKind::AddrInUse {
        format!("is held by {}", holder(address))
    } else if kind == ErrorKind::PermissionDenied {
        let first = first_unprivileged_port();
        format!("is privileged: this user may not bind ports below {first}")
    } else if kind == ErrorKind::AddrNotAvailable {
        format!("is not to be had: this machine has no address {}", address.ip())
    } else {
        format!("cannot be used: {error}")
    }
}

/// The error for a port that was asked for and cannot be bound, with what to do about it.
pub(crate) fn refused(address: SocketAddr, error: &io::Error) -> Error {
    let (port, kind) = (address.port(), error.kind());
    let told =
        Error::new(error::ErrorKind::Usage, format_args!("port {port} {}", reason(address, error)));
    let macos = cfg!(target_os = "macos");
    if kind == ErrorKind::AddrInUse && macos {
        told.hint(format_args!(
            "`lsof -nP -iTCP:{port}` shows who has it; choose another with `--port`, or leave it out for a \
             free one"
        ))
    } else if kind == ErrorKind::PermissionDenied {
        told.hint(format_args!(
            "choose one from {} up with `--port`, or leave it out for a free one",
            first_unprivileged_port()
        ))
    } else if kind == ErrorKind::AddrNotAvailable && macos {
        told.hint(format_args!(
            "give the machine the address: `sudo ifconfig lo0 alias {}`",
            address.ip()
        ))
    } else if kind == ErrorKind::AddrNotAvailable {
        told.hint("choose another with `--bind`, or leave it out for 127.0.0.1")
    } else {
        told.hint("choose another with `--port`, or leave it out for a free one")
    }
}

#[cfg(target_os = "linux")]
fn first_unprivileged_port() -> u16 {
    let setting = std::fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start");
    setting.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(1024)
}

#[cfg(not(target_os = "linux"))]
fn first_unprivileged_port() -> u16 {
    1024
}

#[cfg(not(target_os = "linux"))]
fn holder(_: SocketAddr) -> String {
    "another program".to_owned()
}

#[cfg(target_os = "linux")]
fn holder(address: SocketAddr) -> String {
    let listening = ["/proc/net/tcp", "/proc/net/tcp6"]
        .iter()
        .filter_map(|table| std::fs::read_to_string(table).ok())
        .find_map(|table| linux::listening(&table, address));
    match listening {
        Some(socket) => match linux::process_of(socket.inode) {
            Some((pid, _)) if pid == std::process::id() => "this agent itself".to_owned(),
            Some((pid, name)) => format!("`{name}` (pid {pid})"),
            // Only root sees the files of other users' processes.
            None => match nix::unistd::User::from_uid(socket.uid.into()) {
                Ok(Some(user)) => format!("a program of the user `{}`", user.name),
                Ok(None) | Err(_) => format!("a program of another user (uid {})", socket.uid),
            },
        },
        // Bound and not listening, or gone by now.
        None => "another program".to_owned(),
    }
}

#[cfg(target_os = "linux")]
mod linux {
    use std::{
        fs,
        net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    };

    /// The state `TCP_LISTEN` in `/proc/net/tcp` (proc_net_tcp in the kernel's documentation).
    const LISTEN: &str = "0A";

    /// A listening socket.
    #[derive(Debug, PartialEq, Eq)]
    pub(super) struct Socket {
        pub(super) uid: u32,
        pub(super) inode: u64,
    }

    /// Finds, in the text of `/proc/net/tcp` or `tcp6`, who listens where `wanted` would.
    pub(super) fn listening(table: &str, wanted: SocketAddr) -> Option<Socket> {
        table.lines().skip(1).find_map(|line| {
            let mut fields = line.split_ascii_whitespace();
            let (ip, port) = fields.nth(1)?.split_once(':')?;
            let (state, uid, inode) = (fields.nth(1)?, fields.nth(3)?, fields.nth(1)?);
            let ip = address(ip)?;
            let here = ip.is_unspecified() || ip == wanted.ip();
            let port = u16::from_str_radix(port, 16).ok()?;
            (state == LISTEN && here && port == wanted.port())
                .then(|| Some(Socket { uid: uid.parse().ok()?, inode: inode.parse().ok()? }))
                .flatten()
        })
    }

    /// An address as the kernel prints it: words of 32 bits in the byte order of the machine.
    fn address(digits: &str) -> Option<IpAddr> {
        let mut bytes = [0; 16];
        let length = digits.len() / 2;
        hex::decode_to_slice(digits, bytes.get_mut(..length)?).ok()?;
        for word in bytes.chunks_exact_mut(4) {
            let native = u32::from_be_bytes([word[0], word[1], word[2], word[3]]).to_ne_bytes();
            word.copy_from_slice(&native);
        }
        match length {
            4 => Some(Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3]).into()),
            16 => Some(Ipv6Addr::from(bytes).to_canonical()),
            _ => None,
        }
    }

    /// Id and name of the process that has the socket of this inode open.
    pub(super) fn process_of(inode: u64) -> Option<(u32, String)> {
        let link = format!("socket:[{inode}]");
        fs::read_dir("/proc").ok()?.flatten().find_map(|process| {
            let pid: u32 = process.file_name().to_str()?.parse().ok()?;
            let mut files = fs::read_dir(process.path().join("fd")).ok()?.flatten();
            files.find(|file| {
                fs::read_link(file.path()).is_ok_and(|target| target.as_os_str() == link.as_str())
            })?;
            let name = fs::read_to_string(process.path().join("comm")).ok()?;
            // Whoever named the process may have put anything there.
            let name = name.trim().chars().filter(|c| !c.is_control() && *c != '`').collect();
            Some((pid, name))
        })
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        #[cfg(target_endian = "little")]
        fn tables_of_the_kernel_are_read() {
            let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1538 00000000:0000 0A 00000000:00000000 00:00000000 00000000   105        0 1526 1 0000000017f668e6 100 0 0 10 0
   1: 0200007F:1539 0100007F:1538 01 00000000:00000000 00:00000000 00000000   105        0 1527 1 0000000017f668e6 100 0 0 10 0
   2: 00000000:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 99 1 0000000017f668e6 100 0 0 10 0";
            let at = |address: &str| listening(table, address.parse().expect("an address"));
            assert_eq!(at("127.0.0.1:5432"), Some(Socket { uid: 105, inode: 1526 }));
            assert_eq!(at("127.0.0.2:5432"), None, "another address");
            assert_eq!(at("127.0.0.2:5433"), None, "a connection is no listener");
            assert_eq!(
                at("127.0.0.9:80"),
                Some(Socket { uid: 0, inode: 99 }),
                "listens everywhere"
            );
            let table = "\n 0: 00000000000000000000000001000000:0016 00000000000000000000000000000000:0000 0A 0:0 00:0 0 7 0 8 1";
            assert_eq!(
                listening(table, "[::1]:22".parse().expect("an address")),
                Some(Socket { uid: 7, inode: 8 })
            );
            assert_eq!(
                listening("nonsense\nmore of it", "127.0.0.1:1".parse().expect("one")),
                None
            );
        }
    }
}

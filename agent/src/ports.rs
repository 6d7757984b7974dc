//! Which local address a reached service has, and that it stays: `ports.json`.

use std::{
    collections::BTreeMap,
    fmt, fs, io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    str::FromStr,
};

use connect_spec::{hash::hash, ids::ServiceName};
use serde::{Deserialize, Serialize};
use tokio::net::{TcpListener, TcpSocket};

use crate::{
    clock,
    error::{Error, ErrorKind, Result},
    home::Home,
    port_holder,
};

const FILE: &str = "ports.json";
const LOCK: &str = "ports.lock";
/// Ports derived from a name lie here: above the well-known, below the ephemeral ones of Linux.
const DERIVED_PORTS: std::ops::Range<u16> = 10_000..30_000;
/// How many ports after the derived one are tried.
const NEXT_PORTS: u16 = 200;
/// Connections that wait for being accepted.
const BACKLOG: u32 = 1024;

/// An address that only this machine can connect to.
///
/// A local port has no authentication of its own: whoever can connect to it is in. So there is none on
/// another address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "IpAddr", into = "IpAddr")]
pub struct Loopback(IpAddr);

impl Loopback {
    /// The usual one.
    pub const DEFAULT: Self = Self(IpAddr::V4(Ipv4Addr::LOCALHOST));
}

impl TryFrom<IpAddr> for Loopback {
    type Error = Error;

    fn try_from(ip: IpAddr) -> Result<Self> {
        if ip.is_loopback() {
            return Ok(Self(ip));
        }
        Err(Error::new(
            ErrorKind::Usage,
            format_args!(
                "{ip} is not an address of this machine alone: a reached port has no authentication of its \
                 own, so it is on 127.0.0.0/8 or ::1 only"
            ),
        ))
    }
}

impl From<Loopback> for IpAddr {
    fn from(address: Loopback) -> Self {
        address.0
    }
}

impl FromStr for Loopback {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let ip: IpAddr = text.parse().map_err(|_| {
            Error::new(ErrorKind::Usage, format_args!("`{text}` is no address, such as 127.0.0.2"))
        })?;
        ip.try_into()
    }
}

impl fmt::Display for Loopback {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What is asked of the local end of a reached service; what is left out is as it was last time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalEnd {
    /// This port and no other.
    pub port: Option<u16>,
    /// On this address.
    pub address: Option<Loopback>,
}

impl LocalEnd {
    /// Whether a service that is at `address` is where this wants it.
    pub(crate) fn is(self, address: SocketAddr) -> bool {
        self.port.is_none_or(|port| port == address.port())
            && self.address.is_none_or(|wanted| wanted.0 == address.ip())
    }
}

/// Where a service is: a port of 127.0.0.1 on disk is the port alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Saved", into = "Saved")]
struct Place {
    address: Loopback,
    port: u16,
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Saved {
    Port(u16),
    Address(SocketAddr),
}

impl TryFrom<Saved> for Place {
    type Error = Error;

    fn try_from(saved: Saved) -> Result<Self> {
        Ok(match saved {
            Saved::Port(port) => Self { address: Loopback::DEFAULT, port },
            Saved::Address(address) => {
                Self { address: address.ip().try_into()?, port: address.port() }
            }
        })
    }
}

impl From<Place> for Saved {
    fn from(place: Place) -> Self {
        if place.address == Loopback::DEFAULT {
            Self::Port(place.port)
        } else {
            Self::Address(place.socket_address())
        }
    }
}

impl Place {
    fn socket_address(self) -> SocketAddr {
        SocketAddr::new(self.address.0, self.port)
    }

    fn listen(self) -> io::Result<TcpListener> {
        let socket =
            if self.address.0.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        // Connections of before that linger are no reason to take another port.
        socket.set_reuseaddr(true)?;
        socket.bind(self.socket_address())?;
        socket.listen(BACKLOG)
    }
}

type Ports = BTreeMap<ServiceName, Place>;

/// A local port that is bound.
#[derive(Debug)]
pub(crate) struct Bound {
    pub(crate) listener: TcpListener,
    /// Why it is not the port that one would expect: the end of "it is not on …".
    pub(crate) passed_over: Option<String>,
}

/// The local address that each service had last, for whoever only looks.
///
/// # Errors
/// When the file cannot be read; [`bind`] would set it aside.
pub(crate) fn remembered(home: &Home) -> Result<BTreeMap<ServiceName, SocketAddr>> {
    let ports = home.read_json_if_there::<Ports>(FILE)?.unwrap_or_default();
    Ok(ports.into_iter().map(|(name, place)| (name, place.socket_address())).collect())
}

/// Whether a service of this name was reached from this home before.
#[must_use]
pub fn was_reached(home: &Home, name: &str) -> bool {
    let mut homes = home.shares().unwrap_or_default();
    homes.push(home.clone());
    homes.iter().any(|home| {
        remembered(home).is_ok_and(|ports| ports.keys().any(|known| known.as_str() == name))
    })
}

/// Binds the local port of a service: the one asked for, else the saved one, else the service's own, else
/// one derived from the name, else the next free one; and saves it.
///
/// # Errors
/// [`ErrorKind::Usage`] when the port asked for is taken; [`ErrorKind::Other`] when none is free.
pub(crate) async fn bind(
    home: &Home,
    name: &ServiceName,
    asked: LocalEnd,
    own: Option<u16>,
) -> Result<Bound> {
    let (home, name) = (home.clone(), name.clone());
    // Another process of the home may hold the lock, for a moment.
    let bound = tokio::task::spawn_blocking(move || bind_and_save(&home, &name, asked, own)).await;
    bound.unwrap_or_else(|_| Err(Error::new(ErrorKind::Other, "the agent is stopping")))
}

fn bind_and_save(
    home: &Home,
    name: &ServiceName,
    asked: LocalEnd,
    own: Option<u16>,
) -> Result<Bound> {
    // A home that cannot be written has ports all the same: they are only not remembered.
    let lock = home.lock_file(LOCK);
    let mut ports = load(home);
    let bound = choose(name, asked, own, &ports)?;
    let at = bound.listener.local_addr()?;
    let place = Place { address: at.ip().try_into()?, port: at.port() };
    if ports.insert(name.clone(), place) != Some(place)
        && let Err(error) = lock.and_then(|_lock| home.write_json(FILE, &ports))
    {
        tracing::warn!(service = %name, %error, "its port is not remembered");
    }
    Ok(bound)
}

/// What is on disk. A file that cannot be read is set aside: it may be of a later version, or worth a look.
fn load(home: &Home) -> Ports {
    match home.read_json_if_there(FILE) {
        Ok(ports) => ports.unwrap_or_default(),
        Err(error) => {
            let aside = format!("ports.damaged-{}.json", clock::now());
            match fs::rename(home.path(FILE), home.path(&aside)) {
                Ok(()) => tracing::warn!(%error, aside, "set aside; ports are chosen anew"),
                Err(cause) => tracing::warn!(%error, %cause, "ports are chosen anew"),
            }
            Ports::new()
        }
    }
}

fn choose(name: &ServiceName, asked: LocalEnd, own: Option<u16>, ports: &Ports) -> Result<Bound> {
    let saved = ports.get(name);
    let address = asked.address.or(saved.map(|saved| saved.address)).unwrap_or(Loopback::DEFAULT);
    let at = |port| Place { address, port };
    if let Some(port) = asked.port {
        let listener = at(port)
            .listen()
            .map_err(|error| port_holder::refused(at(port).socket_address(), &error))?;
        return Ok(Bound { listener, passed_over: None });
    }
    let keeper = |port: u16| {
        ports
            .iter()
            .find(|(other, place)| *other != name && **place == at(port))
            .map(|(other, _)| other)
    };
    let mut passed_over = None;
    let saved = saved.filter(|saved| saved.address == address).map(|saved| saved.port);
    for (port, is_saved) in
        saved.map(|port| (port, true)).into_iter().chain(own.map(|own| (own, false)))
    {
        let reason = match keeper(port).filter(|_| !is_saved) {
            Some(other) => format!("port {port}, which is kept for `{other}`"),
            None => match at(port).listen() {
                Ok(listener) => return Ok(Bound { listener, passed_over }),
                Err(error) => {
                    let reason = port_holder::reason(at(port).socket_address(), &error);
                    format!("port {port}, which {reason}")
                }
            },
        };
        passed_over.get_or_insert(reason);
    }
    let derived = derived_port(name);
    let mut next = (0..NEXT_PORTS).map(|step| derived.saturating_add(step));
    let found =
        next.find_map(|port| if keeper(port).is_some() { None } else { at(port).listen().ok() });
    let listener = match found {
        Some(listener) => listener,
        None => at(0).listen().map_err(|error| {
            if error.kind() == io::ErrorKind::AddrNotAvailable {
                return port_holder::refused(at(derived).socket_address(), &error);
            }
            Error::new(ErrorKind::Other, format_args!("no local port is free: {error}"))
                .hint("end programs that hold ports, or give this service an address with `--bind 127.0.0.2`")
        })?,
    };
    Ok(Bound { listener, passed_over })
}

fn derived_port(name: &ServiceName) -> u16 {
    let [high, low, ..] = hash("port", &[name.as_str().as_bytes()]);
    let span = DERIVED_PORTS.end - DERIVED_PORTS.start - NEXT_PORTS;
    DERIVED_PORTS.start + u16::from_be_bytes([high, low]) % span
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name() -> ServiceName {
        "prod-db".parse().expect("a name")
    }

    fn bound(asked: Option<u16>, own: Option<u16>, saved: &[(&str, u16)]) -> Result<(Bound, u16)> {
        let place = |port| Place { address: Loopback::DEFAULT, port };
        let saved = saved.iter().map(|(name, port)| (name.parse().expect("name"), place(*port)));
        let asked = LocalEnd { port: asked, address: None };
        let bound = choose(&name(), asked, own, &saved.collect())?;
        let port = bound.listener.local_addr()?.port();
        Ok((bound, port))
    }

    #[tokio::test]
    async fn ports_are_chosen_in_the_promised_order() {
        let (taken, busy) = bound(Some(0), None, &[]).expect("a free port");
        let (free, own) = bound(Some(0), None, &[]).expect("a free port");
        drop(free);
        let derived = derived_port(&name());

        let error = bound(Some(busy), None, &[]).expect_err("taken");
        assert_eq!(error.kind, ErrorKind::Usage);
        assert_eq!(bound(None, Some(own), &[]).expect("own").1, own);
        assert_eq!(bound(None, None, &[("prod-db", own)]).expect("saved").1, own);
        assert_eq!(bound(None, Some(own), &[("prod-db", busy)]).expect("own").1, own);
        // Taken, or promised to another service: the derived one or one of the next, and it is said.
        for (own, saved) in [(busy, vec![]), (own, vec![("other", own)])] {
            let (bound, port) = bound(None, Some(own), &saved).expect("derived");
            assert!((derived..derived + NEXT_PORTS).contains(&port), "{port}");
            let reason = bound.passed_over.expect("a reason");
            assert!(reason.starts_with(&format!("port {own}, which is ")), "{reason}");
        }
        assert_eq!(bound(None, None, &[]).expect("derived").0.passed_over, None);
        drop(taken);
    }

    #[tokio::test]
    async fn each_address_has_all_ports() {
        let (_taken, busy) = bound(Some(0), None, &[]).expect("a free port");
        let address = Some("127.0.0.77".parse().expect("a loopback address"));
        let asked = LocalEnd { port: None, address };
        let place = |port| Place { address: Loopback::DEFAULT, port };
        let ports = [("other".parse().expect("a name"), place(busy))].into();
        let bound = choose(&name(), asked, Some(busy), &ports).expect("free there");
        let at = bound.listener.local_addr().expect("bound");
        assert_eq!(at, format!("127.0.0.77:{busy}").parse().expect("an address"));
        assert!(
            asked.is(at)
                && !LocalEnd { port: Some(busy), ..LocalEnd::default() }.is(format!(
                    "127.0.0.77:{}",
                    busy ^ 1
                )
                .parse()
                .expect("an address"))
        );
    }

    #[test]
    fn only_addresses_of_this_machine_alone_are_taken() {
        for good in ["127.0.0.1", "127.255.3.4", "::1"] {
            assert_eq!(good.parse::<Loopback>().expect("loopback").to_string(), good);
        }
        for bad in ["0.0.0.0", "::", "10.0.0.1", "128.0.0.1", "localhost", "127.1", ""] {
            assert_eq!(bad.parse::<Loopback>().expect_err(bad).kind, ErrorKind::Usage, "{bad}");
        }
    }

    #[test]
    fn places_on_disk_are_ports_or_addresses() {
        let text = r#"{"a":5432,"b":"127.0.0.2:5432","c":"[::1]:80"}"#;
        let ports: Ports = serde_json::from_str(text).expect("ports");
        assert_eq!(serde_json::to_string(&ports).expect("text"), text);
        for bad in [r#"{"a":"10.0.0.1:80"}"#, r#"{"a":65536}"#, r#"{"a":-1}"#, "[]", "{"] {
            assert!(serde_json::from_str::<Ports>(bad).is_err(), "{bad}");
        }
    }

    #[tokio::test]
    async fn bindings_at_once_lose_no_port_of_each_other() {
        let dir = tempfile::tempdir().expect("a directory");
        let home = Home::at(dir.path());
        let names: Vec<ServiceName> =
            (0..24).map(|number| format!("svc-{number}").parse().expect("a name")).collect();
        let binding = names.iter().map(|name| bind(&home, name, LocalEnd::default(), None));
        let all = futures_util::future::join_all(binding).await;
        assert!(all.iter().all(Result::is_ok));
        let saved = load(&home);
        assert_eq!(saved.len(), names.len());
        for (name, bound) in names.iter().zip(&all) {
            let at = bound.as_ref().expect("bound").listener.local_addr().expect("an address");
            assert_eq!(saved[name].socket_address(), at);
        }
    }

    #[tokio::test]
    async fn damaged_file_is_set_aside() {
        let dir = tempfile::tempdir().expect("a directory");
        let home = Home::at(dir.path());
        fs::write(home.path(FILE), "{\"prod-db\": 54").expect("our own directory");
        let bound = bind(&home, &name(), LocalEnd::default(), None).await.expect("a port");
        let at = bound.listener.local_addr().expect("an address");
        assert_eq!(load(&home)[&name()].socket_address(), at);
        let aside = fs::read_dir(dir.path())
            .expect("our own directory")
            .flatten()
            .find(|entry| entry.file_name().to_string_lossy().starts_with("ports.damaged-"));
        let kept = fs::read_to_string(aside.expect("it is kept").path()).expect("text");
        assert_eq!(kept, "{\"prod-db\": 54");
    }
}

//! Who is behind a proxy: `X-Forwarded-For`, believed of trusted proxies and of nobody else.

use std::net::{IpAddr, SocketAddr};

use http::{HeaderMap, HeaderName};
use ipnet::IpNet;

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// The proxies whose word counts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TrustedProxies(pub Vec<IpNet>);

impl TrustedProxies {
    /// Whether an address is that of a trusted proxy.
    #[must_use]
    pub fn trust(&self, address: IpAddr) -> bool {
        self.0.iter().any(|network| network.contains(&address))
    }

    /// For whom `peer` sends a request with these headers: `peer` itself, unless it is trusted. Each proxy
    /// appends whom it heard, so the last address that is no trusted proxy is whom the outermost of them
    /// heard; all before it is hearsay. If all are trusted it is the first one. An entry on the way that is
    /// no address makes the whole list worthless.
    #[must_use]
    pub fn client(&self, peer: IpAddr, headers: &HeaderMap) -> IpAddr {
        let peer = peer.to_canonical();
        if !self.trust(peer) {
            return peer;
        }
        let mut client = peer;
        for value in headers.get_all(X_FORWARDED_FOR).into_iter().rev() {
            let Ok(value) = value.to_str() else {
                return peer;
            };
            for entry in value.rsplit(',') {
                match parse(entry.trim()) {
                    Some(address) if self.trust(address) => client = address,
                    Some(address) => return address,
                    None => return peer,
                }
            }
        }
        client
    }
}

/// An address, as proxies write it: with or without a port, IPv6 with or without brackets.
fn parse(entry: &str) -> Option<IpAddr> {
    let bare = entry.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(entry);
    let address = bare.parse::<IpAddr>().ok();
    address
        .or_else(|| entry.parse::<SocketAddr>().ok().map(|address| address.ip()))
        .map(|address| address.to_canonical())
}

/// Reads a network, or an address as the network of it alone.
///
/// # Errors
/// It is neither.
pub fn parse_network(text: &str) -> Result<IpNet, String> {
    let network = text.parse::<IpNet>().ok();
    network
        .or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from))
        .ok_or_else(|| "expected an address or a network, such as 10.0.0.0/8".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(peer: &str, values: &[&str], expected: &str) {
        let networks = ["127.0.0.1", "10.0.0.0/8", "2001:db8::/32"];
        let trusted = networks.map(|network| parse_network(network).unwrap());
        let mut headers = HeaderMap::new();
        for value in values {
            let value = http::HeaderValue::from_bytes(value.as_bytes()).unwrap();
            headers.append(X_FORWARDED_FOR, value);
        }
        let client = TrustedProxies(trusted.to_vec()).client(peer.parse().unwrap(), &headers);
        assert_eq!(client, expected.parse::<IpAddr>().unwrap(), "{peer} {values:?}");
    }

    #[test]
    fn only_trusted_proxies_are_believed() {
        check("192.0.2.9", &["198.51.100.1"], "192.0.2.9");
        check("192.0.2.9", &["127.0.0.1"], "192.0.2.9");
        check("127.0.0.2", &["198.51.100.1"], "127.0.0.2");
        check("127.0.0.1", &["198.51.100.1"], "198.51.100.1");
        check("127.0.0.1", &[], "127.0.0.1");
        check("::ffff:127.0.0.1", &["198.51.100.1"], "198.51.100.1");
        check("::ffff:192.0.2.9", &["198.51.100.1"], "192.0.2.9");
    }

    #[test]
    fn the_last_address_that_is_no_proxy_counts() {
        // What the client claimed stands before what the proxy saw.
        check("127.0.0.1", &["203.0.113.5, 198.51.100.1"], "198.51.100.1");
        check("127.0.0.1", &["127.0.0.1,198.51.100.1"], "198.51.100.1");
        // Two proxies, and a client that claims to be one.
        check("127.0.0.1", &["10.9.9.9, 198.51.100.1, 10.1.2.3"], "198.51.100.1");
        // Several headers are one list (RFC 9110 section 5.3).
        check("127.0.0.1", &["203.0.113.5", "198.51.100.1", "10.1.2.3 ,10.1.2.4"], "198.51.100.1");
        // A client within the trusted network.
        check("127.0.0.1", &["10.1.2.3, 10.1.2.4"], "10.1.2.3");
    }

    #[test]
    fn addresses_may_have_ports_and_brackets() {
        check("127.0.0.1", &["198.51.100.1:4711"], "198.51.100.1");
        check("127.0.0.1", &["2001:db9::1"], "2001:db9::1");
        check("127.0.0.1", &["[2001:db9::1]"], "2001:db9::1");
        check("127.0.0.1", &["[2001:db9::1]:4711, [2001:db8::7]:1"], "2001:db9::1");
        check("127.0.0.1", &["::ffff:198.51.100.1"], "198.51.100.1");
    }

    #[test]
    fn what_is_no_address_makes_the_list_worthless() {
        for wrong in [
            "",
            "unknown",
            "198.51.100.1;",
            "198.51.100",
            "\"198.51.100.1\"",
            "198.51.100.1, ",
            "198.51.100.1,,10.1.2.3",
            "198.51.100.1, _hidden, 10.1.2.3",
            "[2001:db9::1",
            "198.51.100.1:",
            "198.51.100.1\u{fc}",
        ] {
            check("127.0.0.1", &[wrong], "127.0.0.1");
        }
        // Beyond the address that counts nobody looks.
        check("127.0.0.1", &["nonsense, 198.51.100.1"], "198.51.100.1");
    }

    #[test]
    fn networks_are_networks_or_addresses() {
        assert_eq!(parse_network("10.1.2.3").unwrap().to_string(), "10.1.2.3/32");
        assert_eq!(parse_network("::1").unwrap().to_string(), "::1/128");
        for wrong in ["", "10.0.0.0/33", "proxy.example", "10.0.0.0/", "*"] {
            assert!(parse_network(wrong).is_err(), "{wrong}");
        }
    }
}

//! IP addresses as the maps hold them: one format for both families.

use core::net::{IpAddr, Ipv6Addr};

crate::map_type! {
    /// An address in network order, IPv4 as `::ffff:a.b.c.d`, so that a v4-mapped destination of an `AF_INET6` socket
    /// finds the same entry as the plain one.
    pub struct Addr {
        /// The sixteen bytes on the wire.
        pub bytes: [u8; 16],
    }
}

impl Addr {
    /// From the kernel's four words, each in network order as `user_ip6` and `local_ip6` hold them.
    #[inline(always)]
    pub fn from_words(words: [u32; 4]) -> Self {
        let mut bytes = [0; 16];
        let [a, b, c, d] = words;
        bytes[0..4].copy_from_slice(&a.to_ne_bytes());
        bytes[4..8].copy_from_slice(&b.to_ne_bytes());
        bytes[8..12].copy_from_slice(&c.to_ne_bytes());
        bytes[12..16].copy_from_slice(&d.to_ne_bytes());
        Self { bytes }
    }

    /// From the kernel's one word in network order, as `user_ip4` holds it.
    #[inline(always)]
    pub fn from_v4_word(word: u32) -> Self {
        Self::from_words([0, 0, u32::to_be(0x0000_ffff), word])
    }

    /// The four words in network order, as the kernel's contexts take them.
    #[inline(always)]
    pub fn words(self) -> [u32; 4] {
        let b = self.bytes;
        [
            u32::from_ne_bytes([b[0], b[1], b[2], b[3]]),
            u32::from_ne_bytes([b[4], b[5], b[6], b[7]]),
            u32::from_ne_bytes([b[8], b[9], b[10], b[11]]),
            u32::from_ne_bytes([b[12], b[13], b[14], b[15]]),
        ]
    }

    /// True for IPv4 in its mapped form.
    #[inline(always)]
    pub fn is_v4(self) -> bool {
        let [a, b, c, _] = self.words();
        a == 0 && b == 0 && c == u32::to_be(0x0000_ffff)
    }

    /// 127.0.0.0/8 (mapped) and `::1`.
    #[inline(always)]
    pub fn is_loopback(self) -> bool {
        let [a, b, c, d] = self.words();
        if self.is_v4() { self.bytes[12] == 127 } else { a == 0 && b == 0 && c == 0 && d == u32::to_be(1) }
    }

    /// `0.0.0.0` (mapped) and `::`; connecting there means loopback.
    #[inline(always)]
    pub fn is_unspecified(self) -> bool {
        let [a, b, c, d] = self.words();
        d == 0 && ((a == 0 && b == 0 && c == 0) || self.is_v4())
    }
}

impl From<IpAddr> for Addr {
    fn from(ip: IpAddr) -> Self {
        let v6 = match ip {
            IpAddr::V4(v4) => v4.to_ipv6_mapped(),
            IpAddr::V6(v6) => v6,
        };
        Self { bytes: v6.octets() }
    }
}

impl From<Addr> for IpAddr {
    fn from(addr: Addr) -> Self {
        Ipv6Addr::from(addr.bytes).to_canonical()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addr(text: &str) -> Addr {
        Addr::from(text.parse::<IpAddr>().unwrap())
    }

    #[test]
    fn v4_and_mapped_are_one_key() {
        assert_eq!(addr("10.9.0.10"), addr("::ffff:10.9.0.10"));
        assert_eq!(Addr::from_v4_word(u32::from_ne_bytes([10, 9, 0, 10])), addr("10.9.0.10"));
    }

    #[test]
    fn words_round_trip() {
        for text in ["10.9.0.10", "fd00::1:2", "::", "::1"] {
            assert_eq!(Addr::from_words(addr(text).words()), addr(text));
            assert_eq!(IpAddr::from(addr(text)), text.parse::<IpAddr>().unwrap());
        }
    }

    #[test]
    fn classes() {
        assert!(addr("127.8.0.1").is_loopback() && addr("::1").is_loopback());
        assert!(!addr("10.0.0.1").is_loopback() && !addr("::2").is_loopback() && !addr("fe80::1").is_loopback());
        assert!(addr("0.0.0.0").is_unspecified() && addr("::").is_unspecified());
        assert!(!addr("::1").is_unspecified() && !addr("0.0.0.1").is_unspecified());
    }
}

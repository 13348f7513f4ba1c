//! cgroup/getpeername4 and 6, which the kernel also runs for accept(2): the application sees the real client.

use aya_ebpf::programs::SockAddrContext;
use sealane_common::keys::ClientAddr;

use crate::ctx;
use crate::maps::CLIENT;

/// For AF_INET sockets: an IPv6 client cannot be shown there, and does not occur (families never mix in one connection).
#[inline(always)]
pub fn show_client4(ctx: &SockAddrContext) {
    if let Some(client) = client(ctx)
        && client.addr.is_v4()
    {
        ctx::set_peer4(ctx, client);
    }
}

/// For AF_INET6 sockets, with IPv4 clients in their mapped form.
#[inline(always)]
pub fn show_client6(ctx: &SockAddrContext) {
    if let Some(client) = client(ctx) {
        ctx::set_peer6(ctx, client);
    }
}

#[inline(always)]
fn client(ctx: &SockAddrContext) -> Option<ClientAddr> {
    // SAFETY: the pointer is the socket's own storage, checked by `storage`; sock_ops wrote it once, before accept().
    ctx::storage(ctx, &CLIENT, false).map(|client| unsafe { *client })
}

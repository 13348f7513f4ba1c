//! The only reading and writing of kernel contexts. Each field is read through a volatile pointer into a local first:
//! LLVM otherwise merges the reads into `ctx + offset` arithmetic, which the verifier answers with "dereference of
//! modified ctx ptr". Addresses become [`Addr`], ports host order.

use core::ffi::c_void;
use core::ptr::{addr_of, addr_of_mut};

use aya_ebpf::bindings::{bpf_sk_lookup, bpf_sock, bpf_sock_addr, bpf_sock_ops};
use aya_ebpf::btf_maps::SkStorage;
use aya_ebpf::helpers::generated::{
    bpf_get_current_cgroup_id, bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_setsockopt, bpf_sk_storage_get,
    bpf_sock_ops_cb_flags_set,
};
use aya_ebpf::programs::{SkLookupContext, SockAddrContext, SockOpsContext, SockoptContext};
use sealane_common::addr::Addr;
use sealane_common::keys::{ClientAddr, PodEntry};

use crate::maps::{EXEMPT, PODS};

const SOL_SOCKET: i32 = 1;
const SO_MARK: i32 = 36;
const AF_INET: u32 = 2;
const IPPROTO_MPTCP: u32 = 262;
const TCP_CLOSE: u32 = 7;
const BPF_SK_STORAGE_GET_F_CREATE: u64 = 1;

/// An address and a port.
#[derive(Clone, Copy)]
pub struct Endpoint {
    pub addr: Addr,
    pub port: u16,
}

macro_rules! read {
    ($ptr:expr, $($field:tt)+) => {
        // SAFETY: the context pointer is the kernel's own and the field lies within the context; the verifier checks both.
        unsafe { core::ptr::read_volatile(addr_of!((*$ptr).$($field)+)) }
    };
}

macro_rules! write {
    ($ptr:expr, $value:expr, $($field:tt)+) => {
        // SAFETY: as for `read`; the verifier refuses fields that this program type may not write.
        unsafe { core::ptr::write_volatile(addr_of_mut!((*$ptr).$($field)+), $value) }
    };
}

macro_rules! words {
    ($ptr:expr, $field:ident) => {
        [read!($ptr, $field[0]), read!($ptr, $field[1]), read!($ptr, $field[2]), read!($ptr, $field[3])]
    };
}

// --- bpf_sock_addr: connect, getpeername ---

#[inline(always)]
pub fn destination4(ctx: &SockAddrContext) -> Endpoint {
    let sa: *mut bpf_sock_addr = ctx.sock_addr;
    Endpoint { addr: Addr::from_v4_word(read!(sa, user_ip4)), port: network_port(read!(sa, user_port)) }
}

#[inline(always)]
pub fn destination6(ctx: &SockAddrContext) -> Endpoint {
    let sa: *mut bpf_sock_addr = ctx.sock_addr;
    Endpoint { addr: Addr::from_words(words!(sa, user_ip6)), port: network_port(read!(sa, user_port)) }
}

#[inline(always)]
pub fn protocol(ctx: &SockAddrContext) -> u32 {
    read!(ctx.sock_addr, protocol)
}

#[inline(always)]
pub fn set_peer4(ctx: &SockAddrContext, client: ClientAddr) {
    let [_, _, _, word] = client.addr.words();
    write!(ctx.sock_addr, word, user_ip4);
    write!(ctx.sock_addr, u32::from(client.port.to_be()), user_port);
}

#[inline(always)]
pub fn set_peer6(ctx: &SockAddrContext, client: ClientAddr) {
    let [a, b, c, d] = client.addr.words();
    write!(ctx.sock_addr, a, user_ip6[0]);
    write!(ctx.sock_addr, b, user_ip6[1]);
    write!(ctx.sock_addr, c, user_ip6[2]);
    write!(ctx.sock_addr, d, user_ip6[3]);
    write!(ctx.sock_addr, u32::from(client.port.to_be()), user_port);
}

/// The socket's mark.
#[inline(always)]
pub fn mark(ctx: &SockAddrContext) -> u32 {
    let sk: *mut bpf_sock = read!(ctx.sock_addr, __bindgen_anon_1.sk);
    if sk.is_null() { 0 } else { read!(sk, mark) }
}

/// Sets the socket's mark; false where the kernel refused.
#[inline(always)]
pub fn set_mark(ctx: &SockAddrContext, mark: u32) -> bool {
    set_sock_mark(ctx.sock_addr.cast(), mark)
}

/// The value that `map` holds for the socket, made where it is missing and `create` is set.
#[inline(always)]
pub fn storage<T>(ctx: &SockAddrContext, map: &SkStorage<T>, create: bool) -> Option<*mut T> {
    let sk: *mut bpf_sock = read!(ctx.sock_addr, __bindgen_anon_1.sk);
    sk_storage(sk, map, create)
}

/// The enrolled pod that the context's socket belongs to.
#[inline(always)]
pub fn pod(ctx: *mut c_void) -> Option<PodEntry> {
    // SAFETY: every program type that calls this may use the helper on its own context.
    let cookie = unsafe { bpf_get_netns_cookie(ctx) };
    // SAFETY: the entry is copied out at once; the agent replaces entries whole, and the map is not preallocated.
    unsafe { PODS.get(cookie) }.copied()
}

/// True for the agent itself: its cgroup is a leaf of its own.
#[inline(always)]
pub fn is_agent() -> bool {
    // SAFETY: no arguments; allowed in every cgroup program that calls this, also on 6.1.
    let cgroup = unsafe { bpf_get_current_cgroup_id() };
    EXEMPT.get_ptr(cgroup).is_some()
}

// --- bpf_sockopt ---

/// level and optname.
#[inline(always)]
pub fn option(ctx: &SockoptContext) -> (i32, i32) {
    (read!(ctx.sockopt, level), read!(ctx.sockopt, optname))
}

/// The socket's mark, and whether it is an MPTCP one that is connected, or about to be.
#[inline(always)]
pub fn option_socket(ctx: &SockoptContext) -> (u32, bool) {
    let sk: *mut bpf_sock = read!(ctx.sockopt, __bindgen_anon_1.sk);
    if sk.is_null() {
        return (0, false);
    }
    (read!(sk, mark), read!(sk, protocol) == IPPROTO_MPTCP && read!(sk, state) != TCP_CLOSE)
}

/// The option's value where it is an int.
#[inline(always)]
pub fn option_u32(ctx: &SockoptContext) -> Option<u32> {
    let start: *mut c_void = read!(ctx.sockopt, __bindgen_anon_2.optval);
    let end: *mut c_void = read!(ctx.sockopt, __bindgen_anon_3.optval_end);
    let value: *const u32 = start.cast();
    if value as usize + 4 > end as usize {
        return None;
    }
    // SAFETY: the bounds were checked against optval_end just above.
    Some(unsafe { core::ptr::read_volatile(value) })
}

/// True where the program sees only the first page of the option.
#[inline(always)]
pub fn is_long_option(ctx: &SockoptContext) -> bool {
    read!(ctx.sockopt, optlen) > 4096
}

/// Lets the kernel use the caller's own buffer. Without it an option longer than a page fails with EFAULT, since only a page
/// is copied for the program to see.
#[inline(always)]
pub fn keep_long_option(ctx: &SockoptContext) {
    if is_long_option(ctx) {
        write!(ctx.sockopt, 0, optlen);
    }
}

// --- bpf_sock_ops ---

/// The socket's own end and the other one.
#[inline(always)]
pub fn ends(ctx: &SockOpsContext) -> (Endpoint, Endpoint) {
    let ops: *mut bpf_sock_ops = ctx.ops;
    let family = read!(ops, family);
    let local = either(family, read!(ops, local_ip4), words!(ops, local_ip6));
    let remote = either(family, read!(ops, remote_ip4), words!(ops, remote_ip6));
    // local_port is in host order; remote_port is the whole word in network order, unlike a sock_addr's user_port.
    let local_port = read!(ops, local_port) as u16;
    let remote_port = u32::from_be(read!(ops, remote_port)) as u16;
    (Endpoint { addr: local, port: local_port }, Endpoint { addr: remote, port: remote_port })
}

#[inline(always)]
pub fn op(ctx: &SockOpsContext) -> u32 {
    read!(ctx.ops, op)
}

/// Old and new TCP state, in a state callback.
#[inline(always)]
pub fn states(ctx: &SockOpsContext) -> (u32, u32) {
    (read!(ctx.ops, __bindgen_anon_1.args[0]), read!(ctx.ops, __bindgen_anon_1.args[1]))
}

#[inline(always)]
pub fn socket_cookie(ctx: &SockOpsContext) -> u64 {
    // SAFETY: sock_ops may use the helper on its own context.
    unsafe { bpf_get_socket_cookie(ctx.ops.cast()) }
}

/// Asks for state callbacks on this socket.
#[inline(always)]
pub fn want_state_callbacks(ctx: &SockOpsContext) {
    const STATE_CB_FLAG: i32 = 4;
    let flags = read!(ctx.ops, bpf_sock_ops_cb_flags) as i32 | STATE_CB_FLAG;
    // SAFETY: sock_ops may use the helper on its own context; flags of other programs are kept.
    unsafe { bpf_sock_ops_cb_flags_set(ctx.ops, flags) };
}

/// The socket's mark, by its sock_ops context.
#[inline(always)]
pub fn ops_mark(ctx: &SockOpsContext) -> u32 {
    let sk: *mut bpf_sock = read!(ctx.ops, __bindgen_anon_2.sk);
    if sk.is_null() { 0 } else { read!(sk, mark) }
}

#[inline(always)]
pub fn set_ops_mark(ctx: &SockOpsContext, mark: u32) -> bool {
    set_sock_mark(ctx.ops.cast(), mark)
}

#[inline(always)]
pub fn ops_storage<T>(ctx: &SockOpsContext, map: &SkStorage<T>, create: bool) -> Option<*mut T> {
    let sk: *mut bpf_sock = read!(ctx.ops, __bindgen_anon_2.sk);
    sk_storage(sk, map, create)
}

// --- bpf_sk_lookup ---

/// What sk_lookup decides from.
pub struct Lookup {
    pub local: Endpoint,
    pub remote: Addr,
    pub ingress_ifindex: u32,
}

#[inline(always)]
pub fn lookup_protocol(ctx: &SkLookupContext) -> u32 {
    read!(ctx.lookup, protocol)
}

#[inline(always)]
pub fn lookup(ctx: &SkLookupContext) -> Lookup {
    let sl: *mut bpf_sk_lookup = ctx.lookup;
    let family = read!(sl, family);
    let local = either(family, read!(sl, local_ip4), words!(sl, local_ip6));
    let remote = either(family, read!(sl, remote_ip4), words!(sl, remote_ip6));
    let local = Endpoint { addr: local, port: read!(sl, local_port) as u16 };
    Lookup { local, remote, ingress_ifindex: read!(sl, ingress_ifindex) }
}

// --- shared ---

/// Adds to a map value. The target has no atomic read-modify-write in `core`, though every BPF machine has this instruction.
#[inline(always)]
pub fn atomic_add(value: *mut i64, delta: i64) {
    #[cfg(target_arch = "bpf")]
    // SAFETY: the caller's pointer is a checked, aligned map value; the instruction touches these eight bytes alone.
    unsafe {
        core::arch::asm!("lock *(u64 *)({value} + 0) += {delta}", value = in(reg) value, delta = in(reg) delta);
    }
    #[cfg(not(target_arch = "bpf"))]
    // SAFETY: only type-checked, never run: the host build is for lints.
    unsafe {
        core::sync::atomic::AtomicI64::from_ptr(value).fetch_add(delta, core::sync::atomic::Ordering::Relaxed);
    }
}

/// Both forms are read before the branch: reads behind it would be merged into one of a computed offset.
#[inline(always)]
fn either(family: u32, v4: u32, v6: [u32; 4]) -> Addr {
    if family == AF_INET { Addr::from_v4_word(v4) } else { Addr::from_words(v6) }
}

#[inline(always)]
fn network_port(word: u32) -> u16 {
    u16::from_be(word as u16)
}

#[inline(always)]
fn set_sock_mark(ctx: *mut c_void, mark: u32) -> bool {
    let mut value = mark;
    let ptr: *mut u32 = &mut value;
    // SAFETY: connect and sock_ops programs may use the helper on their own context; `value` outlives the call.
    unsafe { bpf_setsockopt(ctx, SOL_SOCKET, SO_MARK, ptr.cast(), 4) == 0 }
}

#[inline(always)]
fn sk_storage<T>(sk: *mut bpf_sock, map: &SkStorage<T>, create: bool) -> Option<*mut T> {
    if sk.is_null() {
        return None;
    }
    let flags = if create { BPF_SK_STORAGE_GET_F_CREATE } else { 0 };
    let map: *const SkStorage<T> = map;
    // SAFETY: `sk` is the context's socket, checked; a null value makes the kernel zero a new entry.
    let value = unsafe { bpf_sk_storage_get(map.cast_mut().cast(), sk.cast(), core::ptr::null_mut(), flags) };
    if value.is_null() { None } else { Some(value.cast()) }
}

//! The one macro that makes a type fit to be a map key or value: no padding (which BPF hash maps would compare), every
//! bit pattern valid.

/// Declares `repr(C)` structs that are [`bytemuck::Pod`] (which rejects padding at compile time) and, for the agent,
/// `aya::Pod`.
#[macro_export]
macro_rules! map_type {
    ($($(#[$meta:meta])* pub struct $name:ident { $($(#[$fmeta:meta])* pub $field:ident: $ty:ty,)* })*) => {$(
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, bytemuck::Pod, bytemuck::Zeroable)]
        #[repr(C)]
        pub struct $name { $($(#[$fmeta])* pub $field: $ty,)* }

        #[cfg(feature = "user")]
        const _: () = {
            const fn is_pod<T: bytemuck::Pod>() {}
            is_pod::<$name>();
            // SAFETY: bytemuck::Pod, asserted above, is the stronger promise: no padding, any bit pattern valid.
            unsafe impl aya::Pod for $name {}
        };
    )*};
}

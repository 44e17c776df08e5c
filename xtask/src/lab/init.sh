#!/bin/busybox sh
# The lab's initramfs: finds the root disk and goes there.
export PATH=/bin
/bin/busybox --install -s /bin
mkdir -p /dev /proc /sys /root
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
for module in $(cat /modules/modules.list); do insmod "/modules/$module"; done
mount -t ext4 -o noatime,noinit_itable /dev/vda /root || exec sh
mount -t tmpfs -o mode=755 run /root/run
mkdir -p /root/run/lab
cp /xtask /root/run/lab/xtask
cp -a /files/. /root/
for dir in dev proc sys; do mount --move "/$dir" "/root/$dir"; done
exec switch_root /root /usr/bin/busybox init

const cards=[...document.querySelectorAll('.images figure')],buttons=[...document.querySelectorAll('.tools button')],
field=document.querySelector('.tools input'),count=document.querySelector('.tools output');
let wanted='';
function show(){const words=field.value.toLowerCase();let seen=0;
for(const card of cards){const fits=(!wanted||card.dataset.kinds.split('|').includes(wanted))&&card.dataset.text.includes(words);
card.hidden=!fits;seen+=fits}
count.textContent=seen+' of '+cards.length;
for(const button of buttons)button.setAttribute('aria-pressed',button.dataset.kind===wanted)}
for(const button of buttons)button.addEventListener('click',()=>{wanted=button.dataset.kind;show()});
field.addEventListener('input',show);
document.querySelector('.tools').hidden=false;
function reveal(){const card=location.hash&&document.querySelector(location.hash);
if(card&&card.hidden){wanted='';field.value='';show();card.scrollIntoView()}}
addEventListener('hashchange',reveal);
show();
